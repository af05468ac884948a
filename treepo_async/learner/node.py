"""The ranks of the learner on this machine: started together, watched, and all started again when one dies.

    start all -> one dies -> kill the others -> start all from the newest checkpoint -> ... -> all end with 0

Waits: for the end of a rank (the kernel ends the wait). A rank that hangs ends by the timeout of its groups; when rank 0
is done, the others have `END_S`. A rank whose cause lies in the run itself (any `TreepoError`) ends the run at once.

Without CUDA the ranks are forked from this process, which has imported everything and started no thread: eight ranks
then start in seconds and share most of their memory. With CUDA, which does not survive a fork, they are spawned.

Neighbours: where the ranks are on several nodes, `lead` and `follow` have each node start and watch its own.
"""

import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Self

import torch

from treepo_async.errors import TreepoError
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import cause_of
from treepo_async.process import die_with_parent

END_S = 30.0

Work = Callable[[int], None]
"""What a rank does, given its number."""


@dataclass
class Rank:
    """One running rank."""

    number: int
    process: multiprocessing.process.BaseProcess
    words: Connection
    """Where it says why it failed."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a group of ranks ended."""

    cause: str
    is_final: bool
    """Whether starting again would end in the same way."""
    was_killed: bool = False
    """Whether somebody ended a process, which makes others fail."""

    @property
    def weight(self) -> tuple[bool, bool]:
        """Of several failures of one group the one of the highest weight is the cause."""
        return self.is_final, self.was_killed


def run_ranks(make_work: Callable[[], Work], *, num_ranks: int, max_restarts: int) -> None:
    """Run the learner's ranks to their end.

    Args:
        make_work: called before each start of the group; gives what each rank does.
        num_ranks: of the group.
        max_restarts: of the whole group.

    Raises:
        TreepoError: a rank failed for a reason of the run, or the group failed too often.
    """
    spare_garbage()
    num_restarts = 0
    while (failure := _run_once(make_work(), num_ranks)) is not None:
        check_restart(failure, num_restarts, max_restarts)
        num_restarts += 1


def spare_garbage() -> None:
    """What was imported stays out of the collector, so that forked ranks share its memory."""
    gc.collect()
    gc.freeze()


def check_restart(failure: Failure, num_restarts: int, max_restarts: int) -> None:
    """Tell of a failure after which all ranks start again.

    Raises:
        TreepoError: they do not.
    """
    if failure.is_final:
        raise TreepoError(failure.cause)
    if num_restarts == max_restarts:
        raise TreepoError(f"gave up after {max_restarts} restarts: {failure.cause}")
    emit("alarm", alarm="the learner's ranks are started again", detail=failure.cause)


def _run_once(work: Work, num_ranks: int) -> Failure | None:
    """Start every rank and wait for the end; None when all ended well."""
    ranks = Ranks.start(work, range(num_ranks))
    try:
        return _watch(ranks)
    finally:
        ranks.kill()


def _watch(ranks: "Ranks") -> Failure | None:
    deadline = None
    while ranks.running:
        wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait(ranks.sentinels(), timeout=wait_s)
        if not ended:
            return Failure(f"{ranks} did not end {END_S:g} s after rank 0", is_final=False)
        failure = ranks.reap(ended)
        if failure is not None:
            return failure
        deadline = deadline or time.monotonic() + END_S
    return None


@dataclass
class Ranks:
    """The ranks of one start that are on this node."""

    all: list[Rank]
    running: list[Rank]

    @classmethod
    def start(cls, work: Work, numbers: Iterable[int]) -> Self:
        """Start ranks by their numbers."""
        ranks = [_start(work, number) for number in numbers]
        return cls(ranks, list(ranks))

    def sentinels(self) -> list[int]:
        """Of the running ones, for `multiprocessing.connection.wait`."""
        return [rank.process.sentinel for rank in self.running]

    def reap(self, ended: Collection[Any]) -> Failure | None:
        """Take those off whose sentinels are among `ended`. Gives the failure that counts most."""
        over = [rank for rank in self.running if rank.process.sentinel in ended]
        self.running = [rank for rank in self.running if rank not in over]
        for rank in over:
            # its end is seen a moment before its exit code is there
            rank.process.join()
        failures = [_failure(rank) for rank in over if rank.process.exitcode]
        return max(failures, key=lambda failure: failure.weight, default=None)

    def kill(self) -> None:
        """End all of them."""
        for rank in self.all:
            rank.process.kill()
        for rank in self.all:
            rank.process.join()
            rank.words.close()
        self.all, self.running = [], []

    def __str__(self) -> str:
        return f"ranks {', '.join(str(rank.number) for rank in self.running)}"


def _start(work: Work, number: int) -> Rank:
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    words, own_end = context.Pipe(duplex=False)
    process = context.Process(
        target=_main, args=(work, number, own_end, os.getpid()), name=f"rank-{number}", daemon=True
    )
    process.start()
    own_end.close()
    return Rank(number, process, words)


def _failure(rank: Rank) -> Failure:
    code = rank.process.exitcode or 0
    if code < 0:
        cause = f"rank {rank.number} was killed by {signal.Signals(-code).name}"
        return Failure(cause, is_final=False, was_killed=True)
    try:
        said = json.loads(rank.words.recv_bytes())
    except (EOFError, OSError):
        # it ended without a word, or within one
        return Failure(f"rank {rank.number} ended with code {code}", is_final=False)
    return Failure(f"rank {rank.number}: {said['cause']}", said["is_final"])


def _main(work: Work, number: int, words: Connection, parent: int) -> None:
    """A rank's outermost frame."""
    die_with_parent()
    if os.getppid() != parent:
        return
    # the parent's handler would end a rank as if it were done
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        work(number)
    except Exception as error:
        said = {"cause": cause_of(error), "is_final": isinstance(error, TreepoError)}
        words.send_bytes(json.dumps(said).encode())
        raise
