"""Where the segments of one tree lie when its tokens stand in depth-first pre-order.

Axis letters: `S` segments in creation order, `L` leaves, `D` grid levels, `T` sampled tokens in packed order. Neighbour:
`pack`. Pure numpy; indices count from the tree's first prompt token.

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


def by_level(tree: Tree, advantages: Float64, tree_index: int) -> Float64:
    """Advantages of one tree as [L, D], those of whole trajectories on all of their levels.

    Args:
        tree: that they are of.
        advantages: [L] or [L, D]; what stands behind a leaf's own last level is not read.
        tree_index: names the tree in errors.

    Raises:
        TreeError: they have another shape, or a leaf has some that are NaN and some that are not.
    """
    advantages = np.asarray(advantages, np.float64)
    num_leaves, depth = len(tree.leaves), num_levels(tree)
    if advantages.shape not in ((num_leaves,), (num_leaves, depth)):
        raise TreeError(
            f"advantages[{tree_index}] has shape {list(advantages.shape)}, the tree has {num_leaves} "
            f"leaves and {depth} levels; it needs one value per leaf, or one per leaf and level"
        )
    if advantages.ndim == 1:
        return np.broadcast_to(advantages[:, None], (num_leaves, depth))
    level_L1 = np.array([[tree.segments[leaf].level] for leaf in tree.leaves])
    torn_LD = np.isnan(advantages) != np.isnan(advantages[:, :1])
    torn = np.argwhere(torn_LD & (np.arange(depth) <= level_L1))
    if len(torn) > 0:
        leaf, level = torn[0]
        raise TreeError(
            f"advantages[{tree_index}] is {advantages[leaf, level]} for leaf {leaf} at level {level} and "
            f"{advantages[leaf, 0]} at level 0; a leaf counts at all of its levels or, with NaN, at none"
        )
    return advantages


class Geometry:
    """Where the segments of one tree lie behind its prompt; per-segment arrays stand in creation order."""

    def __init__(self, tree: Tree) -> None:
        self.num_prompt = len(tree.prompt.token_ids)
        self._parents = [s.parent for s in tree.segments]
        self.parent_S = np.array(self._parents)
        self.level_S = np.array([s.level for s in tree.segments])
        self.length_S = np.array([len(s) for s in tree.segments])
        self.order = np.array(depth_first(self._parents))
        ordered = self.length_S[self.order]
        self.start_S = np.empty_like(self.length_S)
        self.start_S[self.order] = self.num_prompt + np.cumsum(ordered) - ordered
        self.index_T = np.arange(self.num_prompt, self.num_prompt + ordered.sum())

    def spread(self, per_segment: NDArray[Any]) -> NDArray[Any]:
        """A value per segment `[S, ...]` to a value per sampled token `[T, ...]`, in packed order."""
        return np.repeat(per_segment[self.order], self.length_S[self.order], axis=0)

    def prev(self) -> Int64:
        """Packed index of each sampled token's predecessor on its path."""
        last_S = self.start_S + self.length_S - 1
        before_S = np.where(self.parent_S == ROOT, self.num_prompt - 1, last_S[self.parent_S])
        return np.where(
            self.index_T == self.spread(self.start_S), self.spread(before_S), self.index_T - 1
        )

    def depth(self) -> Int64:
        """Depth of each sampled token on its path, the prompt included."""
        depth_S = np.full_like(self.length_S, self.num_prompt)
        for i, parent in enumerate(self.parent_S):
            if parent != ROOT:
                depth_S[i] = depth_S[parent] + self.length_S[parent]
        return self.index_T - self.spread(self.start_S) + self.spread(depth_S)

    def end(self) -> Int64:
        """Where the subtree of each sampled token's segment closes."""
        end_S = self.start_S + self.length_S
        for i in reversed(range(len(end_S))):
            parent = self.parent_S[i]
            if parent != ROOT:
                end_S[parent] = max(end_S[parent], end_S[i])
        return self.spread(end_S)

    def leaf_sums(self, leaves: Sequence[int], advantages_LD: Float64) -> Float64:
        """Sums of max(A, 0), max(-A, 0) and 1 over the counted leaves below each sampled token, [T, 3].

        Args:
            leaves: segment index of each leaf, [L].
            advantages_LD: A, per leaf and grid level; a leaf counts unless its value at level 0 is NaN.
        """
        sums_S3 = np.zeros((len(self.parent_S), 3))
        terms_LD3 = np.stack(
            [
                np.maximum(advantages_LD, 0.0),
                np.maximum(-advantages_LD, 0.0),
                np.ones_like(advantages_LD),
            ],
            axis=2,
        )
        for leaf in np.flatnonzero(~np.isnan(advantages_LD[:, 0])).tolist():
            path = self._path(leaves[leaf])
            sums_S3[path] += terms_LD3[leaf, self.level_S[path]]
        return self.spread(sums_S3)

    def _path(self, segment: int) -> list[int]:
        """Segments from this one up to the prompt."""
        path = []
        while segment != ROOT:
            path.append(segment)
            segment = self._parents[segment]
        return path
