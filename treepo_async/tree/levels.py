"""A tree seen by grid level: which node each of its trajectories passes at the end of each level.

Axis letters: `L` leaves, `D` levels of the tree, `N` node numbers. A node is a path up to the end of a grid level, or
up to the end of the trajectory where that comes first; its number is 1 + the index of its last segment, and 0 is the
prompt.

Invariant: segments that were cut inside a level (at a version boundary) make no node of their own, so nothing that is
computed from this view depends on such cuts.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from treepo_async.types import ROOT, Tree

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

PROMPT = 0
"""Number of the node that all trajectories start from."""
BEHIND = -1
"""Stands where a trajectory has already ended."""


@dataclass(frozen=True, slots=True)
class Levels:
    """The nodes of a tree; numbers that end no level are unused."""

    nodes_LD: Int64
    """[L, D], the node at the end of each level, `BEHIND` after the leaf's own last one."""
    parent_N: Int64
    """[N], the node one level up; `PROMPT` for itself."""
    inclusion_N: Float64
    """[N], probability with which pruning let the path go on, over the node's own level."""

    @classmethod
    def of(cls, tree: Tree) -> Self:
        """Find the nodes of a tree in one pass over its segments and one over its leaves' levels."""
        parents, inclusions = [PROMPT], [1.0]
        for segment in tree.segments:
            last = segment.parent + 1
            goes_on = (
                segment.parent != ROOT and tree.segments[segment.parent].level == segment.level
            )
            parents.append(parents[last] if goes_on else last)
            inclusions.append(segment.inclusion * (inclusions[last] if goes_on else 1.0))
        parent_N = np.array(parents, np.int64)
        return cls(_nodes(tree, parent_N), parent_N, np.array(inclusions, np.float64))


def num_levels(tree: Tree) -> int:
    """Grid levels of the longest trajectory: D."""
    return 1 + max(segment.level for segment in tree.segments)


def level_tokens(tree: Tree) -> Int64:
    """Response tokens of each trajectory on each grid level, [L, D]; 0 behind its own last level."""
    grid = tree.sampling.segment_tokens
    starts_D = grid * np.arange(num_levels(tree))
    tokens_LD: Int64 = np.clip(tree.num_tokens_L[:, None] - starts_D, 0, grid)
    return tokens_LD


def _nodes(tree: Tree, parent_N: Int64) -> Int64:
    level_L = np.array([tree.segments[leaf].level for leaf in tree.leaves])
    node_L = np.array(tree.leaves) + 1
    nodes_LD = np.full((len(node_L), num_levels(tree)), BEHIND)
    for level in reversed(range(nodes_LD.shape[1])):
        passed = level_L >= level
        nodes_LD[passed, level] = node_L[passed]
        node_L[passed] = parent_N[node_L[passed]]
    return nodes_LD
