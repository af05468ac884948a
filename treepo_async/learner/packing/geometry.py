"""Where the segments of one piece lie when its tokens stand in depth-first pre-order.

Axis letters: `M` the piece's segments in packed order, `L` leaves of the tree, `J` leaves of the piece, `D` grid levels, `T` sampled
tokens in packed order, `K` pairs of a leaf and a segment on its path. Neighbour: `pack`. Pure numpy; indices count from the
piece's first prompt token.

Invariant: in pre-order the subtree of a segment is one contiguous range that the segment's own tokens open. Hence
`k` is on the path of `q` exactly when `k <= q < end[k]`, where `end[k]` closes the subtree of k's segment: an ancestor's
tokens come before and its range contains q; a token of another branch lies behind q or has closed before it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import TreeError
from treepo_async.tree.levels import num_levels
from treepo_async.types import ROOT, Tree

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


def depth_first(parents: Sequence[int]) -> list[int]:
    """Pre-order of segments given their parents, siblings in creation order.

    Args:
        parents: [S], index of each segment's parent, `ROOT` for the prompt.
    """
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    order: list[int] = []
    pending = children.get(ROOT, [])[::-1]
    while pending:
        segment = pending.pop()
        order.append(segment)
        pending.extend(reversed(children.get(segment, ())))
    return order


def by_level(tree: Tree, values: Float64, name: str) -> Float64:
    """Values of one tree as [L, D], those of whole trajectories on all of their levels.

    Args:
        tree: that they are of.
        values: [L] or [L, D]; what stands behind a leaf's own last level is not read.
        name: of the values, in errors.

    Raises:
        TreeError: they have another shape, or a leaf has some that are NaN and some that are not.
    """
    values = np.asarray(values, np.float64)
    num_leaves, depth = len(tree.leaves), num_levels(tree)
    if values.shape not in ((num_leaves,), (num_leaves, depth)):
        raise TreeError(
            f"{name} has shape {list(values.shape)}, the tree has {num_leaves} "
            f"leaves and {depth} levels; it needs one value per leaf, or one per leaf and level"
        )
    if values.ndim == 1:
        return np.broadcast_to(values[:, None], (num_leaves, depth))
    level_L1 = np.array([[tree.segments[leaf].level] for leaf in tree.leaves])
    torn_LD = np.isnan(values) != np.isnan(values[:, :1])
    torn = np.argwhere(torn_LD & (np.arange(depth) <= level_L1))
    if len(torn) > 0:
        leaf, level = torn[0]
        raise TreeError(
            f"{name} is {values[leaf, level]} for leaf {leaf} at level {level} and "
            f"{values[leaf, 0]} at level 0; a leaf counts at all of its levels or, with NaN, at none"
        )
    return values


class Geometry:
    """Where the segments on the paths of some leaves of a tree lie behind its prompt."""

    def __init__(self, tree: Tree, leaves: Sequence[int]) -> None:
        """Lay out.

        Args:
            tree: any.
            leaves: indices into `tree.leaves`, [J].
        """
        paths = [tree.path(tree.leaves[leaf]) for leaf in leaves]
        chosen = {segment for path in paths for segment in path}
        order = [i for i in depth_first([s.parent for s in tree.segments]) if i in chosen]
        slot_of = {segment: slot for slot, segment in enumerate(order)}
        segments = [tree.segments[i] for i in order]
        self.num_prompt = len(tree.prompt.token_ids)
        self.segment_M = np.array(order, np.int64)
        """Index of each in the tree."""
        self.parent_M = np.array([slot_of.get(s.parent, ROOT) for s in segments], np.int64)
        """Place of each one's parent among them, `ROOT` for the prompt."""
        self.level_M = np.array([s.level for s in segments], np.int64)
        self.length_M = np.array([len(s) for s in segments], np.int64)
        self.start_M = self.num_prompt + np.cumsum(self.length_M) - self.length_M
        self.index_T = np.arange(self.num_prompt, self.num_prompt + self.length_M.sum())
        self.path_leaf_K = np.repeat(np.arange(len(paths)), [len(path) for path in paths])
        """Which leaf of the piece, by place in `leaves`, ..."""
        self.path_slot_K = np.array([slot_of[i] for path in paths for i in path], np.int64)
        """... has which segment, by place among them, on its path."""

    def spread(self, values_M: NDArray[Any]) -> NDArray[Any]:
        """A value per segment `[M, ...]` to a value per sampled token `[T, ...]`."""
        return np.repeat(values_M, self.length_M, axis=0)

    def prev(self) -> Int64:
        """Packed index of each sampled token's predecessor on its path."""
        last_M = self.start_M + self.length_M - 1
        before_M = np.where(self.parent_M == ROOT, self.num_prompt - 1, last_M[self.parent_M])
        return np.where(
            self.index_T == self.spread(self.start_M), self.spread(before_M), self.index_T - 1
        )

    def depth(self) -> Int64:
        """Depth of each sampled token on its path, the prompt included."""
        depth_M = np.full_like(self.length_M, self.num_prompt)
        for slot, parent in enumerate(self.parent_M):
            if parent != ROOT:
                depth_M[slot] = depth_M[parent] + self.length_M[parent]
        return self.index_T - self.spread(self.start_M) + self.spread(depth_M)

    def end(self) -> Int64:
        """Where the subtree of each sampled token's segment closes."""
        end_M = self.start_M + self.length_M
        for slot in reversed(range(len(end_M))):
            parent = self.parent_M[slot]
            if parent != ROOT:
                end_M[parent] = max(end_M[parent], end_M[slot])
        return self.spread(end_M)

    def along(self, terms_JD: Float64) -> Float64:
        """Terms of each leaf at the level of each segment on its path, [K]."""
        terms_K: Float64 = terms_JD[self.path_leaf_K, self.level_M[self.path_slot_K]]
        return terms_K

    def sums(self, terms_JD: Float64) -> Float64:
        """Sum over the leaves below each segment of their terms at its level, [M]."""
        sums_M = np.zeros(len(self.parent_M))
        np.add.at(sums_M, self.path_slot_K, self.along(terms_JD))
        return sums_M
