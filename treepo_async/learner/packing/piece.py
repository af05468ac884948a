"""A piece: some trajectories of one tree that are trained in one microbatch.

What their paths share is computed once in it. All counted trajectories of a tree make the largest piece; one trajectory
alone makes the smallest, and a batch of such is ordinary packed training. Neighbours: `divide` makes pieces, `pack` lays them out.
"""

from dataclasses import dataclass

import numpy as np

from treepo_async.learner.packing.geometry import Float64


@dataclass(frozen=True, slots=True)
class Piece:
    """Trajectories of one tree."""

    tree: int
    """Index of the tree in the sequence the piece belongs to."""
    leaves: tuple[int, ...]
    """Indices into its `leaves`, at least one."""


def counted_leaves(advantages: Float64) -> tuple[int, ...]:
    """Leaves that are trained: those whose advantage, at level 0, is not NaN.

    Args:
        advantages: [L] or [L, D].
    """
    first_L = advantages if advantages.ndim == 1 else advantages[:, 0]
    return tuple(np.flatnonzero(~np.isnan(first_L)).tolist())
