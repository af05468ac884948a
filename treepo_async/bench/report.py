"""A sweep in words: the console's lines, `cells.csv` and `table.md`."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from treepo_async.bench import paper
from treepo_async.bench.cells import CELL_FIELDS, Arm, Cell
from treepo_async.bench.markdown import markdown
from treepo_async.bench.samples import Sample
from treepo_async.bench.summary import FIGURES, Spread, Summary

_SPREAD = ("median", "low", "high")
_OWN = ("speed_up", "cpu_speed_up", "token_gain")
CELL_COLUMNS = (
    *CELL_FIELDS,
    "pairs",
    *(f"{name}_{part}" for name in _OWN for part in _SPREAD),
    "limit",
    "share_of_limit",
    "child_cached_share",
    *(f"{arm}_{name}_{part}" for arm in Arm for name in FIGURES for part in _SPREAD),
)
Columns = dict[str, Callable[[Summary], str]]
"""Name: how to fill it. Where two figures stand they are of trees and of independent sampling."""
_SHAPE: Columns = {
    "depth x segment": lambda s: f"{s.cell.depth} x {s.cell.segment}",
    "width": lambda s: f"{s.cell.width}",
    "branch": lambda s: f"{s.cell.branch}",
    "prompt": lambda s: f"{s.cell.prompt}",
    "pairs": lambda s: f"{s.pairs}",
}
_SPEED: Columns = {
    **_SHAPE,
    "**speed-up**": lambda s: f"**{s.speed_up.median:.2f}** ({_range(s.speed_up)})",
    "by processor time": lambda s: f"{s.cpu_speed_up.median:.2f}",
    "limit": lambda s: f"{s.limit:.2f}",
    "of the limit": lambda s: f"{s.share_of_limit:.0%}",
    "decoded / delivered": lambda s: f"{s.tree('decoded_per_delivered').median:.3f}",
    "children's prefix from the cache": lambda s: share(s.child_cached_share),
    "trajectories/s": lambda s: _both(s, "trajectories_per_s", ".1f"),
    "tokens/s": lambda s: _both(s, "tokens_per_s", ",.0f"),
    "without cached prefix": lambda s: _both(s, "processed_tokens_per_s", ",.0f"),
    "decoded tokens/s": lambda s: _both(s, "decoded_tokens_per_s", ",.0f"),
    "mean length": lambda s: _both(s, "mean_delivered_tokens", ".0f"),
    "requests": lambda s: _both(s, "requests", ".0f"),
}
_WORK: Columns = {
    **_SHAPE,
    "wall time, s": lambda s: _both(s, "wall_s", ".2f"),
    "trajectories": lambda s: _both(s, "trajectories", ",.0f"),
    "decoded tokens": lambda s: _both(s, "decoded_tokens", ",.0f"),
    "delivered tokens": lambda s: _both(s, "delivered_tokens", ",.0f"),
    "prefix tokens computed": lambda s: _both(s, "computed_tokens", ",.0f"),
    "prefix tokens from the cache": lambda s: _both(s, "cached_tokens", ",.0f"),
}


def pair_line(tree: Sample, independent: Sample) -> str:
    """What a pair gave."""
    first = min((tree, independent), key=lambda sample: sample.place).arm
    return (
        f"  pair {tree.pair}  tree {tree.wall_s:.2f} s  independent {independent.wall_s:.2f} s  "
        f"speed-up {independent.wall_s / tree.wall_s:.2f} "
        f"(by processor time {independent.engine_cpu_s / tree.engine_cpu_s:.2f})  "
        f"decoded/delivered {tree.decoded_per_delivered:.3f}  "
        f"children's prefix from the cache {share(tree.child_cached_share)}  ({first} first)"
    )


def cell_line(summary: Summary) -> str:
    """What a cell gave."""
    return (
        f"  speed-up {summary.speed_up.median:.2f} ({_range(summary.speed_up)}) of a limit of {summary.limit:.2f}: "
        f"{summary.share_of_limit:.0%} (by processor time {summary.cpu_speed_up.median:.2f})  "
        f"trajectories/s {_both(summary, 'trajectories_per_s', '.1f')}  "
        f"decoded tokens/s {_both(summary, 'decoded_tokens_per_s', ',.0f')}"
    )


def share(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def write_cells(file: Path, summaries: Sequence[Summary]) -> None:
    """Write `cells.csv`: one row for each cell, every figure with its median, least and largest value."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, CELL_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(_row(summary) for summary in summaries)


def write_table(file: Path, summaries: Sequence[Summary]) -> None:
    """Write `table.md`: speed and work for each set-up of engine and model, and the shapes of the paper beside ours."""
    parts = []
    for name in dict.fromkeys(setup(summary.cell) for summary in summaries):
        own = [summary for summary in summaries if setup(summary.cell) == name]
        parts += [f"{name}:", table(_SPEED, own), "What it took:", table(_WORK, own)]
    notes = (
        "Medians over pairs, (least - most). Two figures are trees / independent sampling. The limit is what the decoded "
        "tokens alone would give: delivered / decoded tokens of trees. By processor time: of the "
        "engine's processes; the better figure where others used the machine meanwhile."
    )
    beside = markdown(paper.HEADER, paper.beside(summaries))
    file.write_text("\n\n".join([*parts, notes, beside, paper.NOTES]) + "\n")


def table(columns: Columns, summaries: Sequence[Summary]) -> str:
    """Cells as rows."""
    return markdown(columns, ([fill(s) for fill in columns.values()] for s in summaries))


def setup(cell: Cell) -> str:
    """What is the same for all cells of a sweep."""
    return (
        f"{cell.model}, {cell.prompts} prompts at once, at most {cell.running} requests running, "
        f"stop={cell.stop}"
    )


def _row(summary: Summary) -> dict[str, object]:
    row: dict[str, object] = {**asdict(summary.cell), "pairs": summary.pairs}
    for name in ("limit", "share_of_limit", "child_cached_share"):
        row[name] = getattr(summary, name)
    for name in _OWN:
        row |= _spread(name, getattr(summary, name))
    for arm, figures in summary.arms.items():
        for name, spread in figures.items():
            row |= _spread(f"{arm}_{name}", spread)
    return row


def _spread(name: str, spread: Spread) -> dict[str, object]:
    return {f"{name}_{part}": getattr(spread, part) for part in _SPREAD}


def _range(spread: Spread) -> str:
    return f"{spread.low:.2f} - {spread.high:.2f}"


def _both(summary: Summary, figure: str, form: str) -> str:
    pair = (summary.tree(figure).median, summary.independent(figure).median)
    return " / ".join(format(value, form) for value in pair)
