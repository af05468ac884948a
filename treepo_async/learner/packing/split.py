"""A tree that is larger than a microbatch, cut where the fewest tokens have to be computed twice.

Leaves stand in depth-first order. A piece of consecutive leaves computes the first one's whole path, and of each further leaf what it
does not share with the leaf before it. So a cut before leaf `j` computes again exactly what `j` shares with its
predecessor, and the best cuts follow from a dynamic programme over the leaves, in O(leaves^2) at most. Best among pieces
of consecutive leaves, that is: another order of the children, or pieces with gaps, could be cheaper still.

Neighbours: `divide` asks, `piece` names what comes out. Pure Python.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from treepo_async.learner.packing.geometry import depth_first
from treepo_async.types import Tree


@dataclass(frozen=True, slots=True)
class Row:
    """Leaves of a tree in depth-first order."""

    leaves: tuple[int, ...]
    """[J], indices into the tree's `leaves`."""
    lengths: tuple[int, ...]
    """[J], tokens of each trajectory, its prompt included."""
    shared: tuple[int, ...]
    """[J], how many of these it shares with the leaf before it; 0 for the first."""


def row_of(tree: Tree, leaves: Sequence[int]) -> Row:
    """Put leaves in depth-first order and measure what neighbours share.

    Args:
        tree: any.
        leaves: indices into its `leaves`, in any order, at least one.
    """
    rank = {segment: i for i, segment in enumerate(depth_first([s.parent for s in tree.segments]))}
    ordered = sorted(leaves, key=lambda leaf: rank[tree.leaves[leaf]])
    paths = [tree.path(tree.leaves[leaf]) for leaf in ordered]
    num_prompt = len(tree.prompt.token_ids)

    def tokens(path: Sequence[int]) -> int:
        return num_prompt + sum(len(tree.segments[i]) for i in path)

    return Row(
        leaves=tuple(ordered),
        lengths=tuple(tokens(path) for path in paths),
        shared=(0, *(tokens(_common(before, path)) for before, path in pairwise(paths))),
    )


def split(row: Row, budget_tokens: int) -> list[tuple[int, ...]]:
    """Cut a row into pieces that fit, so that the fewest tokens are computed more than once.

    Args:
        row: the leaves of a tree.
        budget_tokens: most tokens of a piece; a single trajectory that is longer makes one of its own.

    Returns:
        The leaves of each piece, in the order of the row; of equally cheap cuts the fewest.
    """
    cuts = best_cuts(row.lengths, row.shared, budget_tokens)
    return [row.leaves[start:stop] for start, stop in pairwise([*cuts, len(row.leaves)])]


def best_cuts(lengths: Sequence[int], shared: Sequence[int], budget_tokens: int) -> list[int]:
    """Where the pieces begin, 0 included; see `Row` and `split`."""
    num_leaves = len(lengths)
    # of the first `stop` leaves: (tokens computed again, pieces), and where the last piece begins
    best: list[tuple[float, int]] = [(0, 0), *[(math.inf, 0)] * num_leaves]
    begin = [0] * (num_leaves + 1)
    for stop in range(1, num_leaves + 1):
        size = 0
        for start in reversed(range(stop)):
            size += lengths[start] - (shared[start + 1] if start + 1 < stop else 0)
            if size > budget_tokens and start + 1 < stop:
                break  # a leaf more never makes a piece smaller
            again, pieces = best[start]
            best[stop], begin[stop] = min(
                (best[stop], begin[stop]), ((again + shared[start], pieces + 1), start)
            )
    cuts, stop = list[int](), num_leaves
    while stop:
        stop = begin[stop]
        cuts.append(stop)
    return cuts[::-1]


def _common(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The segments that two paths begin with."""
    both = list[int]()
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        both.append(a)
    return both
