"""Ranks of a learner as processes of this machine, for many cases in a row.

Importing Megatron takes seconds of a core, so one fresh process imports it and forks the ranks, and each rank
opens and closes the groups of one case after another. No wait is without an end: a rank that waits for a dead one fails
after `GROUP_TIMEOUT_S`, the first rank that fails ends all, and so does the deadline.
"""

import multiprocessing
import sys
import time

from treepo_async.process import free_ports

GROUP_TIMEOUT_S = 30.0
KILL_S = 5.0


class Ranks:
    """Ranks at work; `wait` for them."""

    def __init__(self, job, cases, *, deadline_s):
        """Start `job(case)` on the ranks of each case.

        Args:
            job: a function of a module; called with groups open.
            cases: picklable; `case.layout` says how many ranks it needs.
            deadline_s: of all cases together.
        """
        self.deadline_s = deadline_s
        # largest first, so that a rank without a part in a case has none in any later one
        cases = sorted(cases, key=lambda case: -case.layout.world_size)
        spawn = multiprocessing.get_context("spawn")
        self.parent = spawn.Process(target=_fork, args=(job, cases, deadline_s))
        self.parent.start()

    def wait(self):
        """Return once all cases are done; fails when a rank did."""
        self.parent.join(self.deadline_s + 2 * KILL_S)
        self.parent.kill()
        self.parent.join()
        assert self.parent.exitcode == 0, "a rank failed or ran out of time; see its output"


def _fork(job, cases, deadline_s):
    """The warm process."""
    deadline = time.monotonic() + deadline_s
    import treepo_async.learner.build  # noqa: F401  what the ranks shall find imported

    fork = multiprocessing.get_context("fork")
    ports = fork.Array("i", len(cases))
    size = cases[0].layout.world_size
    ranks = [fork.Process(target=_run, args=(r, job, cases, ports)) for r in range(size)]
    for rank in ranks:
        rank.start()
    while any(rank.exitcode is None for rank in ranks):
        if time.monotonic() > deadline or any(rank.exitcode for rank in ranks):
            break
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.join(KILL_S)
    sys.exit(any(rank.exitcode for rank in ranks))


def _run(rank, job, cases, ports):
    """One rank; `ports` are shared, each filled by rank 0 when it opens the case."""
    import torch

    from treepo_async.learner.groups import close_groups, open_groups

    torch.set_num_threads(1)
    for i, case in enumerate(cases):
        if rank >= case.layout.world_size:
            return
        if rank == 0:
            (ports[i],) = free_ports(1)
        while not ports[i]:
            time.sleep(0.001)
        open_groups(
            case.layout,
            rank=rank,
            address=f"127.0.0.1:{ports[i]}",
            timeout_s=GROUP_TIMEOUT_S,
        )
        job(case)
        close_groups()
