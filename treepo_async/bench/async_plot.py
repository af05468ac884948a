"""A comparison at a glance: trained tokens and reward over time, and where the time of each role goes.

Imports matplotlib only to draw.
"""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from treepo_async.bench.async_rows import Account, Arm, CellData
from treepo_async.bench.async_summary import CellSummary, by_arm, ledger_accounts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = dict(
    zip(Arm, ("#777777", "#b08900", "#3c8d53", "#1b6ca8", "#c8553d", "#7d5ba6"), strict=True)
)
ACCOUNTS = dict(
    zip(
        Account,
        ("#1b6ca8", "#c8553d", "#e0a100", "#7d5ba6", "#3c8d53", "#a0c4a0", "#cccccc"),
        strict=True,
    )
)


def draw(file: Path, cells: Sequence[CellData], summaries: Sequence[CellSummary]) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), dpi=130, layout="constrained")
    tokens, second, time = figure.subplots(1, 3)
    _draw_tokens(tokens, cells)
    if any(isfinite(cell.reward) for cell in summaries):
        _draw_rewards(second, cells)
    else:
        _draw_rates(second, summaries)
    _draw_ledgers(time, cells)
    figure.savefig(file)


def _draw_tokens(axes: "Axes", cells: Sequence[CellData]) -> None:
    for cell in cells:
        done, total = [0.0], 0
        for row in cell.steps:
            total += row.trained_tokens
            done.append(total / 1000)
        times = [0.0, *(row.seconds for row in cell.steps)]
        axes.plot(times, done, color=COLOURS[_arm(cell)], linewidth=1)
    for arm in dict.fromkeys(map(_arm, cells)):
        axes.plot([], [], color=COLOURS[arm], label=arm)
    axes.set_xlabel("seconds after the warm-up")
    axes.set_ylabel("trained tokens (thousands)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def _draw_rewards(axes: "Axes", cells: Sequence[CellData]) -> None:
    for cell in cells:
        axes.plot(
            [row.seconds for row in cell.steps],
            [row.reward for row in cell.steps],
            color=COLOURS[_arm(cell)],
            linewidth=1,
        )
    axes.set_xlabel("seconds after the warm-up")
    axes.set_ylabel("mean reward of the batch")
    axes.grid(alpha=0.25)


def _draw_rates(axes: "Axes", summaries: Sequence[CellSummary]) -> None:
    for place, (arm, cells) in enumerate(by_arm(summaries).items()):
        rates = [cell.tokens_per_s for cell in cells]
        axes.bar(place, sum(rates) / len(rates), color=COLOURS[arm], label=arm)
        axes.plot([place] * len(rates), rates, ".", color="black")
    axes.set_xticks([])
    axes.set_ylabel("trained tokens/s (points: seeds)")
    axes.grid(alpha=0.25, axis="y")


def _draw_ledgers(axes: "Axes", cells: Sequence[CellData]) -> None:
    bars = [
        (f"{cell.steps[0].arm} {role}", shares)
        for role in ("learner", "actor", "engine")
        for cell in _first_of_each(cells)
        if (shares := ledger_accounts(cell.ledger, role))
    ]
    for place, (_, shares) in enumerate(bars):
        left = 0.0
        for account, share in shares.items():
            axes.barh(place, share, left=left, color=ACCOUNTS[account])
            left += share
    for account, colour in ACCOUNTS.items():
        axes.barh([0], [0], color=colour, label=account)
    axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("share of the time (first seed)")
    axes.legend(fontsize=7, loc="lower right")


def _first_of_each(cells: Sequence[CellData]) -> list[CellData]:
    """In the order of the arms."""
    first: dict[Arm, CellData] = {}
    for cell in cells:
        first.setdefault(_arm(cell), cell)
    return [first[arm] for arm in Arm if arm in first]


def _arm(cell: CellData) -> Arm:
    return Arm(cell.steps[0].arm)
