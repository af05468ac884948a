"""The speed-up of trees at a glance: over depth for each width, and over width for each depth.

A line is the limit: what the speed-up were if time were decoded tokens alone (`shapes`). Squares on it are shapes of
the TreePO paper. Points with bars are medians of ours, from the least to the largest pair; a hollow one is of paths that
stop where they like, whose limit is not the line. The paper gives its speed-ups as curves only; their mean over its
sweep, 40 % more trajectories per second, is the dotted line. Imports matplotlib only to draw.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from treepo_async.bench.cells import Cell, Stop
from treepo_async.bench.paper import MEAN_GAIN
from treepo_async.bench.shapes import decoded_share, reaches_width
from treepo_async.bench.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1b6ca8", "#c8553d", "#3c8d53", "#7d5ba6", "#b08900", "#555555")
MARKERS = "oDv^P*"


class _Panel(NamedTuple):
    """One of `depth` and `width` is the axis, the other is held along a line."""

    axis: str
    held: str
    label: str
    ticks: tuple[int, ...]
    paper: tuple[int, ...]
    """Where the paper has shapes."""
    last: int


DEPTH = _Panel("depth", "width", "depth (segments)", (4, 7, 14, 28, 56), (7, 14, 28, 56), 80)
WIDTH = _Panel(
    "width", "depth", "width (trajectories of a prompt)", (4, 8, 16, 32, 64), (16, 64), 100
)


def draw(file: Path, summaries: Sequence[Summary]) -> None:
    """Write the picture; nothing without summaries."""
    if not summaries:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), dpi=130, layout="constrained")
    markers = dict(zip(dict.fromkeys(_setting(s.cell) for s in summaries), cycle(MARKERS)))
    for axes, panel in zip(figure.subplots(1, 2, sharey=True), (DEPTH, WIDTH), strict=True):
        _frame(axes, panel)
        lines = sorted({_line(summary, panel) for summary in summaries})
        for line, colour in zip(lines, cycle(COLOURS)):
            _draw_limit(axes, panel, line, colour)
            _draw_points(
                axes, panel, [s for s in summaries if _line(s, panel) == line], markers, colour
            )
        for setting, marker in markers.items():
            axes.plot([], [], marker, color="gray", label=f"ours, {setting}")
        axes.legend(fontsize=8, framealpha=0.9)
    figure.suptitle("Trees against independent sampling: same engine, same number of trajectories")
    figure.savefig(file)


def _frame(axes: "Axes", panel: _Panel) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
    axes.minorticks_off()
    axes.set_xlim(panel.ticks[0] * 0.8, panel.last)
    axes.set_xlabel(panel.label)
    if panel is DEPTH:
        axes.set_ylabel("speed-up (wall time)")
    axes.grid(alpha=0.25)
    axes.axhline(1, color="black", linewidth=0.8)
    gain = "measured by the paper: mean of its sweep, width 64, H100"
    axes.axhline(MEAN_GAIN, color="gray", linestyle=":", label=gain)
    axes.plot([], [], "s", color="gray", markerfacecolor="white", label="a shape of the paper")


def _draw_limit(axes: "Axes", panel: _Panel, line: tuple[int, int], colour: str) -> None:
    value, branch = line
    name = f"limit, {panel.held} {value}" + ("" if branch == 2 else f", branch {branch}")
    for places, style, label in ((range(2, panel.last), "-", name), (panel.paper, "s", None)):
        points = list(_limits(panel, value, branch, places))
        if points:
            axes.plot(
                *zip(*points, strict=True),
                style,
                color=colour,
                markersize=5,
                markerfacecolor="white",
                label=label,
            )


def _limits(
    panel: _Panel, value: int, branch: int, places: Sequence[int]
) -> Iterator[tuple[int, float]]:
    """Where the tree is deep enough for its width."""
    for place in places:
        sizes = {panel.axis: place, panel.held: value}
        shape = (sizes["width"], sizes["depth"], branch, branch)
        if reaches_width(*shape):
            yield place, 1 / decoded_share(*shape)


def _draw_points(
    axes: "Axes",
    panel: _Panel,
    summaries: Sequence[Summary],
    markers: Mapping[str, str],
    colour: str,
) -> None:
    for summary in summaries:
        cell, speed = summary.cell, summary.speed_up
        place = getattr(cell, panel.axis)
        axes.errorbar(
            place,
            speed.median,
            [[speed.median - speed.low], [speed.high - speed.median]],
            fmt=markers[_setting(cell)],
            color=colour,
            markersize=8,
            markerfacecolor=colour if cell.stop is Stop.NONE else "white",
            capsize=4,
        )
        axes.annotate(
            f"{speed.median:.2f}",
            (place, speed.median),
            xytext=(7, -13),
            textcoords="offset points",
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
        )


def _line(summary: Summary, panel: _Panel) -> tuple[int, int]:
    """What is held along the line of a point."""
    return getattr(summary.cell, panel.held), summary.cell.branch


def _setting(cell: Cell) -> str:
    """What is neither depth, width nor branch factor."""
    return f"{cell.model}, segment {cell.segment}, prompt {cell.prompt}, stop={cell.stop}"
