"""The ranks of the learner on this machine: started together, watched, and all started again when one dies.

    start all -> one dies -> kill the others -> start all from the newest checkpoint -> ... -> all end with 0

Waits: for the end of a rank (the kernel ends the wait). A rank that hangs ends by the timeout of its groups; when rank 0
is done, the others have `END_S`. A rank whose cause lies in the run itself (any `TreepoError`) ends the run at once.

Without CUDA the ranks are forked from this process, which has imported everything and started no thread: eight ranks
then start in seconds and share most of their memory. With CUDA, which does not survive a fork, they are spawned.
"""

import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

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


def run_ranks(make_work: Callable[[], Work], *, num_ranks: int, max_restarts: int) -> None:
    """Run the learner's ranks to their end.

    Args:
        make_work: called before each start of the group; gives what each rank does.
        num_ranks: of the group.
        max_restarts: of the whole group.

    Raises:
        TreepoError: a rank failed for a reason of the run, or the group failed too often.
    """
    gc.collect()
    gc.freeze()
    num_restarts = 0
    while (failure := _run_once(make_work(), num_ranks)) is not None:
        if failure.is_final:
            raise TreepoError(failure.cause)
        if num_restarts == max_restarts:
            raise TreepoError(f"gave up after {max_restarts} restarts: {failure.cause}")
        num_restarts += 1
        emit("alarm", alarm="the learner's ranks are started again", detail=failure.cause)


def _run_once(work: Work, num_ranks: int) -> Failure | None:
    """Start every rank and wait for the end; None when all ended well."""
    ranks = [_start(work, number) for number in range(num_ranks)]
    try:
        return _watch(ranks)
    finally:
        for rank in ranks:
            rank.process.kill()
        for rank in ranks:
            rank.process.join()
            rank.words.close()


def _start(work: Work, number: int) -> Rank:
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    words, own_end = context.Pipe(duplex=False)
    process = context.Process(
        target=_main, args=(work, number, own_end, os.getpid()), name=f"rank-{number}", daemon=True
    )
    process.start()
    own_end.close()
    return Rank(number, process, words)


def _watch(ranks: list[Rank]) -> Failure | None:
    running, deadline = list(ranks), None
    while running:
        wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = wait([rank.process.sentinel for rank in running], timeout=wait_s)
        if not ended:
            numbers = ", ".join(str(rank.number) for rank in running)
            return Failure(f"ranks {numbers} did not end {END_S:g} s after rank 0", is_final=False)
        over = [rank for rank in running if rank.process.sentinel in ended]
        for rank in over:
            # its end is seen a moment before its exit code is there
            rank.process.join()
        failed = [rank for rank in over if rank.process.exitcode]
        if failed:
            # a rank that was killed makes others fail: it is the cause
            return _failure(min(failed, key=lambda rank: rank.process.exitcode or 0))
        running = [rank for rank in running if rank not in over]
        deadline = deadline or time.monotonic() + END_S
    return None


def _failure(rank: Rank) -> Failure:
    code = rank.process.exitcode or 0
    if code < 0:
        return Failure(f"rank {rank.number} was killed by {signal.Signals(-code).name}", False)
    if rank.words.poll():
        said = json.loads(rank.words.recv_bytes())
        return Failure(f"rank {rank.number}: {said['cause']}", said["is_final"])
    return Failure(f"rank {rank.number} ended with code {code}", False)


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
