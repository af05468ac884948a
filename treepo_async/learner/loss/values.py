"""Values of a tree's nodes for the weights that train on it, not for those that grew it.

A trajectory is compared with means over its groups, which are values V of nodes. Where the leaves below a node were sampled under
older weights, their plain mean is the value of the older policy. As in V-trace (Espeholt et al. 2018) and Retrace (Munos et al. 2016),
each leaf counts by how likely its path below the node has become:

    V(s) = sum of c(s, leaf) w R / sum of c(s, leaf) w,    c = product over the levels of the path below s of min(cap, exp(mean d))

with d = proximal - behavior log-probs, their mean over the tokens of the path on a level, and w the weights of the trajectories. The
mean over a level's tokens, not their sum, keeps c from vanishing over long levels: it is the geometric mean of the ratios, so c is a
product of one typical ratio a level. Levels, not segments, make the factors, so where weights changed inside of a level makes no
difference to how many there are.

Of `grpo`, the mean is corrected; the standard deviation is that of the rewards about it.

Neighbours: `batch` calls it after the proximal pass, `tree.advantage` has the estimators. Pure numpy.

Invariant: with all log-ratios 0, every c is exactly 1 and every advantage exactly the plain one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Self

import numpy as np

from treepo_async.learner.packing.bounds import log_ratios
from treepo_async.learner.packing.share import SegmentValues
from treepo_async.tree.advantage import MakeGroups
from treepo_async.tree.groups import Groups, ratio, sum_by
from treepo_async.tree.levels import BEHIND, Float64, Levels
from treepo_async.types import ROOT, PolicyVersion, Tree


@dataclass(frozen=True)
class CorrectedGroups(Groups):
    """Groups whose means weigh each leaf by how likely its path has become."""

    share_LK: Float64
    """[L, K], c of the leaf below each node it passes."""

    @classmethod
    def from_factors(
        cls, factor_N: Float64, levels: Levels, rewards_L: Float64, weights_L: Float64
    ) -> Self:
        """As `Groups.of`.

        Args:
            factor_N: [N], factor of each node's own level.
            levels: of the tree.
            rewards_L: [L], over all leaves of the tree.
            weights_L: [L], likewise.
        """
        plain = Groups.of(levels, rewards_L, weights_L)
        nodes_LD = plain.nodes_LK[:, 1:]
        factor_LD = np.where(nodes_LD == BEHIND, 1.0, factor_N[nodes_LD])
        share_LK = np.ones(plain.nodes_LK.shape)
        share_LK[:, :-1] = np.cumprod(factor_LD[:, ::-1], axis=1)[:, ::-1]
        return cls(**{f.name: getattr(plain, f.name) for f in fields(plain)}, share_LK=share_LK)

    def mean_N(self, values_L: Float64) -> Float64:
        """See `Groups`."""
        weight_LK = self.weights_L[:, None] * self.share_LK
        nodes, count = self.nodes_LK[self.passed_LK], len(self.parent_N)
        total_N = sum_by(nodes, (weight_LK * values_L[:, None])[self.passed_LK], count)
        return ratio(total_N, sum_by(nodes, weight_LK[self.passed_LK], count))


def corrected_groups(
    trees: Sequence[Tree],
    proximal: Sequence[SegmentValues],
    version: PolicyVersion,
    *,
    cap: float,
    correct_fresh: bool,
) -> list[MakeGroups]:
    """What makes the corrected groups of each tree, for `tree.advantage.batch_advantages`.

    Args:
        trees: the batch.
        proximal: per tree, log-probs under the weights at the start of the batch; not read below leaves without a reward.
        version: of those weights.
        cap: largest factor of a level.
        correct_fresh: whether fresh tokens have a log-ratio other than 0.
    """
    return [
        partial(
            CorrectedGroups.from_factors,
            _factors(tree, log_ratios(tree, p, version, correct_fresh=correct_fresh), cap),
        )
        for tree, p in zip(trees, proximal, strict=True)
    ]


def _factors(tree: Tree, log_ratio: Sequence[Float64], cap: float) -> Float64:
    """min(cap, exp(mean log-ratio)) over the tokens of its level on the path to each node, [N]; 1 for the prompt."""
    sums, lengths = [0.0], [1]
    for segment, values in zip(tree.segments, log_ratio, strict=True):
        goes_on = segment.parent != ROOT and tree.segments[segment.parent].level == segment.level
        above = segment.parent + 1
        sums.append(float(values.sum()) + (sums[above] if goes_on else 0.0))
        lengths.append(len(values) + (lengths[above] if goes_on else 0))
    return np.minimum(cap, np.exp(np.array(sums) / np.array(lengths)))
