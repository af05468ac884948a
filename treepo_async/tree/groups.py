"""The scored leaves of a tree and the groups they form: what every estimator is computed from.

Axis letters: `L` scored leaves (only those), `K` the prompt and then the levels, `N` node numbers of `levels`. The group
of a node is the leaves below it. Neighbours: `leaf_estimators` and `segment_estimators`.

Invariant: the largest weight is 1, so where all are equal they are exactly 1, and every weighted mean is to the last bit
the plain one.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from treepo_async.tree.levels import BEHIND, PROMPT, Float64, Int64, Levels


@dataclass(frozen=True)
class Groups:
    """Scored leaves, at least one, and the nodes above them."""

    rewards_L: Float64
    """[L]"""
    weights_L: Float64
    """[L], what each leaf counts; the largest is 1."""
    nodes_LK: Int64
    """[L, K], the prompt and then the node at the end of each level; `BEHIND` after the leaf's own last one."""
    parent_N: Int64
    """[N]"""
    inclusion_N: Float64
    """[N], see `Levels`."""

    @classmethod
    def of(cls, levels: Levels, rewards_L: Float64, weights_L: Float64) -> Self:
        """Those of the leaves that have a reward; both arrays are over all leaves of the tree."""
        scored = np.isfinite(rewards_L)
        weights_L = weights_L[scored]
        return cls(
            rewards_L=rewards_L[scored],
            weights_L=weights_L / weights_L.max(),
            nodes_LK=np.pad(levels.nodes_LD[scored], ((0, 0), (1, 0)), constant_values=PROMPT),
            parent_N=levels.parent_N,
            inclusion_N=levels.inclusion_N,
        )

    @property
    def is_lone(self) -> bool:
        """Whether there is one leaf alone."""
        return len(self.rewards_L) == 1

    @cached_property
    def passed_LK(self) -> NDArray[np.bool_]:
        """Which entries of `nodes_LK` are nodes, [L, K]."""
        passed_LK: NDArray[np.bool_] = self.nodes_LK != BEHIND
        return passed_LK

    @cached_property
    def nodes(self) -> Int64:
        """The nodes below the prompt with a leaf below them or at them, ascending."""
        return np.unique(self.nodes_LK[:, 1:][self.passed_LK[:, 1:]])

    @cached_property
    def size_N(self) -> Int64:
        """Leaves of each group, [N]."""
        return np.bincount(self.nodes_LK[self.passed_LK], minlength=len(self.parent_N))

    @cached_property
    def weight_N(self) -> Float64:
        """Summed weight of each group, [N]."""
        return self._sum_N(self.weights_L)

    def mean_N(self, values_L: Float64) -> Float64:
        """Weighted mean over each group, [N]; 0 for a group without leaves."""
        return ratio(self._sum_N(self.weights_L * values_L), self.weight_N)

    def along(self, values_N: NDArray[Any]) -> Float64:
        """Values of nodes along each path, [L, K]; NaN behind its end."""
        return np.where(self.passed_LK, values_N[self.nodes_LK], np.nan)

    def _sum_N(self, values_L: Float64) -> Float64:
        per_entry = np.broadcast_to(values_L[:, None], self.passed_LK.shape)[self.passed_LK]
        return sum_by(self.nodes_LK[self.passed_LK], per_entry, len(self.parent_N))


def sum_by(index: Int64, values: Float64, length: int) -> Float64:
    """The sum of the values that have each index from 0 to `length` - 1, [length], added in their order."""
    return np.bincount(index, values, minlength=length).astype(np.float64, copy=False)


def ratio(numerator: Float64, denominator: Float64) -> Float64:
    """The quotient, 0 where the denominator is."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)
