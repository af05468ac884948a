"""A comparison in words: the console's lines, `cells.csv` and `table.md`."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite
from operator import attrgetter
from pathlib import Path

from treepo_async.bench.async_arms import RUNGS
from treepo_async.bench.async_rows import Account, Arm, CellData
from treepo_async.bench.async_summary import (
    CellSummary,
    Spread,
    by_arm,
    lag_ess,
    lag_shares,
    ledger_accounts,
    ratio,
)
from treepo_async.bench.markdown import markdown

ROLES = ("learner", "actor", "engine", "replay")
UNIQUE = attrgetter("unique_per_s")
_COLUMNS: dict[str, Callable[[Sequence[CellSummary]], str]] = {
    "trained tokens/s": lambda c: number(_over(c, "tokens_per_s"), ",.0f"),
    "unique tokens/s": lambda c: number(_over(c, "unique_per_s"), ",.0f"),
    "step s": lambda c: number(_over(c, "step_s"), ".2f"),
    "wait for a batch s": lambda c: number(_over(c, "wait_batch_s"), ".2f"),
    "training s": lambda c: number(_over(c, "train_s"), ".2f"),
    "to N tokens s": lambda c: number(_over(c, "to_tokens_s"), ".1f"),
    "to the reward s": lambda c: number(_over(c, "to_reward_s"), ".1f"),
    "staleness mean / max": lambda c: (
        f"{number(_over(c, 'staleness_mean'), '.2f')} / {max(cell.staleness_max for cell in c)}"
    ),
    "idle learner": lambda c: number(_over(c, "learner_idle"), ".1%"),
    "idle actors": lambda c: number(_over(c, "actor_idle"), ".1%"),
    "idle engines": lambda c: number(_over(c, "engine_idle"), ".1%"),
    "arrived / trained": lambda c: number(_over(c, "arrived_per_trained"), ".2f"),
    "waste": lambda c: number(_over(c, "waste"), ".1%"),
    "ESS": lambda c: number(_over(c, "ess"), ".3f"),
    "engine closed s, median / p95": lambda c: (
        f"{number(_over(c, 'pause_p50_s'), '.2f')} / {number(_over(c, 'pause_p95_s'), '.2f')}"
    ),
    "last reward": lambda c: number(_over(c, "reward"), ".3f"),
    "held out": lambda c: number(_over(c, "accuracy"), ".3f"),
}
"""Column: how to fill it from the cells of an arm."""


def cell_line(cell: CellSummary) -> str:
    """What a cell gave."""
    return (
        f"{cell.arm} seed {cell.seed}: {cell.tokens_per_s:,.0f} trained tokens/s, {cell.steps} steps in "
        f"{cell.seconds:.1f} s, idle learner {_plain(cell.learner_idle, '.1%')} actors "
        f"{_plain(cell.actor_idle, '.1%')}, staleness {cell.staleness_mean:.2f} max {cell.staleness_max}, "
        f"reward {_plain(cell.reward, '.3f')}, held out {_plain(cell.accuracy, '.3f')}"
    )


def write_cells(file: Path, summaries: Sequence[CellSummary]) -> None:
    """Write `cells.csv`: one row a cell."""
    with file.open("w", newline="") as stream:
        columns = [field.name for field in fields(CellSummary)]
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(cell) for cell in summaries)


def text(cells: Sequence[CellData], summaries: Sequence[CellSummary]) -> str:
    """`table.md`."""
    arms = by_arm(summaries)
    parts = [arms_table(arms), ratios(arms), ledgers(cells), lags(cells)]
    notes = (
        "Means over seeds ± standard deviation. Times count from the end of the warm-up. N is what the cell with the fewest "
        "trained tokens has; the reward is the least that a cell ends with, as a mean of five steps. T_gen and T_train are the "
        "wait for a batch and the training of `sync`, where nothing overlaps. Arrived / trained: trees that came in to be trained "
        "over those that were; far from 1, stock was used up or laid in, and the rate is none that would last."
    )
    return "\n\n".join([*parts, notes]) + "\n"


def arms_table(arms: Mapping[Arm, Sequence[CellSummary]]) -> str:
    """Arms as rows; columns of which nothing is known are left out."""
    filled = {name: [fill(cells) for cells in arms.values()] for name, fill in _COLUMNS.items()}
    known = {name: column for name, column in filled.items() if any(c != "-" for c in column)}
    rows = [
        [arm, str(len(cells)), *(column[place] for column in known.values())]
        for place, (arm, cells) in enumerate(arms.items())
    ]
    return markdown(["arm", "seeds", *known], rows)


def ratios(arms: Mapping[Arm, Sequence[CellSummary]]) -> str:
    """Each arm against both synchronous ones, and what each rung of the ladder adds.

    An arm whose trees have another shape trains other numbers of tokens for the same work, so the factor is given by unique
    tokens too, of which each was decoded once.
    """
    rows, before = [], Arm.SYNC
    for arm in arms:
        ladder = list(Arm)
        rungs = [RUNGS[a] for a in ladder[ladder.index(before) + 1 : ladder.index(arm) + 1]]
        rows.append(
            [
                arm,
                number(ratio(arms, arm, Arm.SYNC), ".2f"),
                number(ratio(arms, arm, Arm.SYNC2), ".2f"),
                " + ".join(rungs) or "-",
                number(ratio(arms, arm, before), ".2f") if rungs else "-",
                number(ratio(arms, arm, before, UNIQUE), ".2f") if rungs else "-",
            ]
        )
        before = arm if rungs else before
    head = ["arm", "over sync", "over sync2", "what it adds", "factor", "factor in unique tokens"]
    return markdown(head, rows)


def ledgers(cells: Sequence[CellData]) -> str:
    """Where the time of each role goes, mean over seeds."""
    rows = []
    for role in ROLES:
        for arm, own in _cells_by_arm(cells).items():
            shares = [found for cell in own if (found := ledger_accounts(cell.ledger, role))]
            if shares:
                means = (Spread.of(share[name] for share in shares).mean for name in Account)
                rows.append([role, arm, *(f"{mean:.1%}" for mean in means)])
    return markdown(["role", "arm", *Account], rows)


def lags(cells: Sequence[CellData]) -> str:
    """Share of the trained tokens by lag, and the effective sample size where it is known."""
    found = {
        arm: [row for cell in own for row in cell.steps]
        for arm, own in _cells_by_arm(cells).items()
    }
    shares = {arm: lag_shares(rows) for arm, rows in found.items()}
    ess = {arm: lag_ess(rows) for arm, rows in found.items()}
    columns = sorted({lag for share in shares.values() for lag in share})
    rows = [
        [arm, *(_lag_words(share.get(lag), ess[arm].get(lag)) for lag in columns)]
        for arm, share in shares.items()
    ]
    return markdown(["arm", *(f"lag {lag}" for lag in columns)], rows)


def number(spread: Spread, form: str) -> str:
    """Mean ± standard deviation, or a dash."""
    if not isfinite(spread.mean):
        return "-"
    return f"{spread.mean:{form}}" + (f" ± {spread.sd:{form}}" if isfinite(spread.sd) else "")


def _lag_words(share: float | None, ess: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.1%}" + ("" if ess is None else f" (ESS {ess:.3f})")


def _cells_by_arm(cells: Sequence[CellData]) -> dict[Arm, list[CellData]]:
    found: dict[Arm, list[CellData]] = {}
    for cell in cells:
        found.setdefault(Arm(cell.steps[0].arm), []).append(cell)
    return {arm: found[arm] for arm in Arm if arm in found}


def _over(cells: Sequence[CellSummary], figure: str) -> Spread:
    return Spread.of(getattr(cell, figure) for cell in cells)


def _plain(value: float, form: str) -> str:
    return format(value, form) if isfinite(value) else "-"
