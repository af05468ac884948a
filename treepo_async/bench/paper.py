"""What the TreePO paper says of the speed of trees, shape by shape, with ours of the same shape beside it.

It gives no number for a shape, only curves and what they come to: a mean over its sweep, and in words about twice the
baseline at one shape. A shape is one of ours where depth, width and branch factor agree: the decoded share follows from
these, the segment's length is another where responses are shorter.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from treepo_async.bench.cells import Cell
from treepo_async.bench.shapes import decoded_share
from treepo_async.bench.summary import Summary

WIDTH, BRANCH = 64, 2
MEAN_GAIN = 1.4
"""Trajectories/s of trees over those of its baseline: the mean over its sweep."""
MEAN_TOKEN_GAIN = 1.3
"""The same of tokens/s, prefixes from the cache counted as work."""


class Shape(NamedTuple):
    """Of responses of 7,000 tokens."""

    depth: int
    segment: int
    gain: float = MEAN_GAIN
    source: str = "mean of its sweep"


SHAPES = (
    Shape(7, 1000),
    Shape(14, 500),
    Shape(28, 250, 2.0, "of two of its three models, in words"),
    Shape(56, 125),
)
HEADER = (
    "paper: depth x segment",
    "limit",
    "its gain in trajectories/s",
    "which is",
    "its gain in tokens/s",
    "ours: depth x segment",
    "our gain in trajectories/s",
    "our gain in tokens/s",
    "gain in trajectories/s, ours / paper",
)
NOTES = (
    f"Beside the paper: width {WIDTH}, branch {BRANCH}; a gain is trees over independent sampling. The paper (one H100, 7B models, 64 prompts "
    f"at once, responses up to 7,000 tokens) gives means over its sweep, {MEAN_GAIN:.2f} for trajectories/s and {MEAN_TOKEN_GAIN:.2f} for tokens/s, "
    "and in words about 2 for 28 segments. The limit is that of full-length paths; those of the paper end where they like, and its figures "
    "may lie above it. Models, machines and lengths differ: the last column compares gains, not speeds."
)


def beside(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """The paper's shapes as rows for `HEADER`, each once for every cell of ours that has it, or with dashes."""
    return [row for shape in SHAPES for row in _rows(shape, summaries)]


def _rows(shape: Shape, summaries: Sequence[Summary]) -> Iterator[tuple[str, ...]]:
    limit = 1 / decoded_share(WIDTH, shape.depth, BRANCH, BRANCH)
    paper = (
        f"{shape.depth} x {shape.segment}",
        f"{limit:.2f}",
        f"{shape.gain:.2f}",
        shape.source,
        f"{MEAN_TOKEN_GAIN:.2f}",
    )
    found = [summary for summary in summaries if _has_shape(summary.cell, shape)]
    for summary in found:
        # both arms deliver as many trajectories, so that the ratio of wall times is that of trajectories/s
        gain = summary.speed_up.median
        ours = (
            _named(summary.cell),
            f"{gain:.2f}",
            f"{summary.token_gain.median:.2f}",
            f"{gain / shape.gain:.2f}",
        )
        yield (*paper, *ours)
    if not found:
        yield (*paper, *["-"] * (len(HEADER) - len(paper)))


def _has_shape(cell: Cell, shape: Shape) -> bool:
    return (cell.depth, cell.width, cell.branch) == (shape.depth, WIDTH, BRANCH)


def _named(cell: Cell) -> str:
    return f"{cell.depth} x {cell.segment} ({cell.model}, prompt {cell.prompt}, stop={cell.stop})"
