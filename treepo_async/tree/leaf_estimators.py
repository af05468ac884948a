"""Estimators that give a trajectory one advantage: its reward against its groups.

Axis letters as in `groups`. `advantage` has the table of names, the shapes and the special cases. Sources: TreePO
(2508.17445, Eq. 3-7), GRPO (2402.03300), RLOO (2402.14740), Tree-GRPO (2509.21240).
"""

import numpy as np

from treepo_async.tree.groups import Groups, ratio, sum_by
from treepo_async.tree.levels import Float64, Int64

EPSILON = 1e-6
"""Added to a standard deviation that is divided by."""


def treepo(
    groups: Groups,
    *,
    leave_one_out: bool = False,
    size_weighted: bool = False,
    subgroup_reject: bool = False,
    no_root: bool = False,
    dedup_levels: bool = False,
) -> Float64:
    """Mean over the levels of `R - mean(group)`, [L]; a lone leaf's reward.

    Args:
        groups: of one tree.
        leave_one_out: the mean of a group leaves the leaf itself out.
        size_weighted: a level counts as much as its group weighs.
        subgroup_reject: levels below the prompt whose rewards are all equal do not count.
        no_root: the prompt does not count, unless no other level does.
        dedup_levels: a level with the same leaves as the one above does not count.
    """
    if groups.is_lone:
        return groups.rewards_L.copy()
    size_LK = groups.along(groups.size_N)
    counts_LK = size_LK >= 2
    if subgroup_reject:
        counts_LK[:, 1:] &= groups.along(_spread_N(groups))[:, 1:] > 0
    if dedup_levels:
        counts_LK[:, 1:] &= size_LK[:, 1:] < size_LK[:, :-1]
    if no_root:
        counts_LK[:, 0] = ~counts_LK[:, 1:].any(axis=1)
    mean_LK = groups.along(groups.mean_N(groups.rewards_L))
    terms_LK = groups.rewards_L[:, None] - mean_LK
    weight_LK = groups.along(groups.weight_N)
    if leave_one_out:
        terms_LK = terms_LK * ratio(weight_LK, weight_LK - groups.weights_L[:, None])
    shares_LK = np.where(counts_LK, weight_LK if size_weighted else 1.0, 0.0)
    terms_LK = np.where(counts_LK, terms_LK, 0.0)
    result: Float64 = (shares_LK * terms_LK).sum(axis=1) / shares_LK.sum(axis=1)
    return result


def grpo(groups: Groups, *, leave_one_out: bool = False) -> Float64:
    """`(R - mean) / (std + 1e-6)` over the tree, [L]; a lone leaf's `R / (1 + 1e-6)`.

    Args:
        groups: of one tree.
        leave_one_out: the mean leaves the leaf itself out; the standard deviation is that of all.
    """
    scores_L = _scores(groups, groups.nodes_LK[:, 0])
    if leave_one_out and not groups.is_lone:
        scores_L = scores_L * _of_others(groups)
    return scores_L


def rloo(groups: Groups) -> Float64:
    """`R - mean(R of the others)` over the tree, [L]; 0 for a lone leaf."""
    if groups.is_lone:
        return np.zeros(1)
    mean = groups.mean_N(groups.rewards_L)[groups.nodes_LK[:, 0]]
    return (groups.rewards_L - mean) * _of_others(groups)


def tree_grpo(groups: Groups) -> Float64:
    """`grpo` over the tree plus `grpo` over the leaves that share the first level, [L]; 0 for a lone leaf."""
    if groups.is_lone:
        return np.zeros(1)
    return _scores(groups, groups.nodes_LK[:, 0]) + _scores(groups, groups.nodes_LK[:, 1])


def _scores(groups: Groups, node_L: Int64) -> Float64:
    """Rewards less the mean of the group of a node, divided by its sample standard deviation + 1e-6, [L].

    A leaf alone in its group keeps its reward and is divided by 1 + 1e-6.
    """
    centred_L = groups.rewards_L - groups.mean_N(groups.rewards_L)[node_L]
    squares_N = sum_by(node_L, groups.weights_L * centred_L**2, len(groups.parent_N))
    size_L = groups.size_N[node_L]
    alone_L = size_L == 1
    weight_L = groups.weight_N[node_L] * (size_L - 1) / size_L
    std_L = np.where(alone_L, 1.0, np.sqrt(ratio(squares_N[node_L], weight_L)))
    scores_L: Float64 = np.where(alone_L, groups.rewards_L, centred_L) / (std_L + EPSILON)
    return scores_L


def _of_others(groups: Groups) -> Float64:
    """What turns the distance to the mean of all into that to the mean of the others, [L]."""
    total = groups.weight_N[groups.nodes_LK[:, 0]]
    factor_L: Float64 = total / (total - groups.weights_L)
    return factor_L


def _spread_N(groups: Groups) -> Float64:
    """Largest less smallest reward of each group, [N]; 0 for a group without leaves."""
    passed, shape = groups.passed_LK, groups.passed_LK.shape
    nodes, rewards = (
        groups.nodes_LK[passed],
        np.broadcast_to(groups.rewards_L[:, None], shape)[passed],
    )
    largest_N = np.full(len(groups.parent_N), -np.inf)
    smallest_N = np.full(len(groups.parent_N), np.inf)
    np.maximum.at(largest_N, nodes, rewards)
    np.minimum.at(smallest_N, nodes, rewards)
    return np.where(groups.size_N > 0, largest_N - smallest_N, 0.0)
