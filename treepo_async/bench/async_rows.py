"""What `bench.py async` measures, whatever back end ran: a row a step, a row an account of time, and the files of both.

    simulation | scripted | real -> CellData (steps, ledger) -> `async_summary` (one row a cell) -> table and plots

A cell is one arm with one seed. Times of a cell count from the end of its warm-up (the first steps, which are left out), so
that neither the start of processes nor the filling of an empty queue is in any rate.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from math import nan
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

from treepo_async.bench.rows import append_rows, read_rows


class Arm(StrEnum):
    """How generation and training are put together; each adds one thing to the one before it.

    `async_arms` has what each means to a run.
    """

    SYNC2 = "sync2"
    """In turn, each phase on the whole machine: the strongest synchronous run."""
    SYNC = "sync"
    """In turn, each role on its half of the machine: what the others have, without overlap."""
    ONE_STEP = "one_step"
    """Generation of the next batch overlaps with training (K=1); requests end before new weights."""
    ASYNC = "async"
    """Generation is up to K batches ahead."""
    ASYNC_INFLIGHT = "async_inflight"
    """Weights change under running requests."""
    ASYNC_EAGER = "async_eager"
    """No barrier within a tree either: a path forks, or runs to its end, as soon as its own segment is there."""


class Account(StrEnum):
    """Where the wall time of a role goes; see docs/metrics.md."""

    COMPUTE = "compute"
    WAIT_DATA = "wait_data"
    WAIT_WEIGHTS = "wait_weights"
    WAIT_QUEUE = "wait_queue"
    SYNC = "sync"
    EVAL = "eval"
    IDLE = "idle"


BUBBLES = (Account.WAIT_DATA, Account.WAIT_WEIGHTS, Account.WAIT_QUEUE, Account.IDLE)
"""Accounts in which a role does nothing."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One update. Figures that a back end does not have are NaN."""

    backend: str
    arm: str
    seed: int
    step: int
    """From 1, those of the warm-up included in the count, but not among the rows."""
    seconds: float
    """From the end of the warm-up to the end of this step."""
    trained_tokens: int
    """Of all trajectories: a token counts once for each leaf below it."""
    trained_tokens_unique: int
    decoded_tokens: int
    """Of the trees that arrived in replay during the step."""
    discarded_tokens: int
    """Of these, decoded for trees that are not trained, for want of spread or of freshness."""
    staleness_mean: float
    """Publications between sampling and training, over tokens."""
    staleness_max: int
    lag_tokens: str
    """Share of trajectory tokens by lag, e.g. `0=0.75 1=0.25`; empty where it is not known."""
    lag_ess: str
    """Effective sample size by lag, written likewise."""
    wait_batch_s: float
    """Of the learner, for the trees of the step; T_gen where nothing overlaps."""
    train_s: float
    """T_train."""
    publish_s: float
    ess: float = nan
    reward: float = nan
    """Mean over the trajectories of the batch."""
    pause_s: float = nan
    """Engine closed to requests for the weights of the step."""
    drain_s: float = nan
    load_s: float = nan
    probe_s: float = nan
    arrived_trees: float = nan
    """Those that came into replay during the step and are trained, then or later."""
    trained_trees: float = nan


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Seconds of one account of one kind of role over a cell, summed over the processes (or slots) of the kind."""

    backend: str
    arm: str
    seed: int
    role: str
    """`learner`, `actor`, `engine` or `replay`."""
    account: str
    seconds: float


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One evaluation on held-out problems."""

    backend: str
    arm: str
    seed: int
    step: int
    seconds: float
    """As in `StepRow`; negative before the end of the warm-up."""
    accuracy: float
    greedy_accuracy: float


@dataclass(frozen=True, slots=True)
class CellData:
    """All of one arm with one seed."""

    steps: Sequence[StepRow]
    ledger: Sequence[LedgerRow] = ()
    evals: Sequence[EvalRow] = ()


def write_lags(values: Iterable[tuple[int, float]]) -> str:
    """A number by lag as one word a lag."""
    return " ".join(f"{lag}={value:.6g}" for lag, value in sorted(values))


def read_lags(text: str) -> dict[int, float]:
    """Read what `write_lags` wrote."""
    pairs = (word.partition("=") for word in text.split())
    return {int(lag): float(value) for lag, _, value in pairs}


def write_cell(folder: Path, cell: CellData) -> None:
    """Write `steps.csv`, `ledger.csv` and `evals.csv` of a cell; the folder is there with all of them, or not at all."""
    rough = folder.with_name(f"{folder.name}.rough")
    shutil.rmtree(rough, ignore_errors=True)
    rough.mkdir(parents=True)
    write_rows(rough, [cell])
    rough.rename(folder)


def write_rows(folder: Path, cells: Sequence[CellData]) -> None:
    """Write the three files anew, with the rows of all cells."""
    for name, row_type, of in _FILES:
        file = folder / name
        file.unlink(missing_ok=True)
        columns = [field.name for field in fields(row_type)]
        append_rows(file, columns, [asdict(row) for cell in cells for row in of(cell)])


def read_cell(folder: Path) -> CellData:
    """What `write_cell` wrote.

    Raises:
        DataError: a line that it did not write.
    """
    found = {name: list(_read(folder / name, row_type)) for name, row_type, _ in _FILES}
    return CellData(found["steps.csv"], found["ledger.csv"], found["evals.csv"])


def _read(file: Path, row_type: Callable[..., Any]) -> Iterator[Any]:
    return (row_type(**row) for row in read_rows(file, get_type_hints(row_type)))


_FILES: tuple[tuple[str, type[Any], Callable[[CellData], Sequence[Any]]], ...] = (
    ("steps.csv", StepRow, attrgetter("steps")),
    ("ledger.csv", LedgerRow, attrgetter("ledger")),
    ("evals.csv", EvalRow, attrgetter("evals")),
)
