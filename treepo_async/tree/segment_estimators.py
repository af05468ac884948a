"""Estimators that give every level of a trajectory its own advantage, from the values of the nodes on its path.

Axis letters: `D` levels, the rest as in `groups`. `advantage` has the table of names, the shapes and the special cases.
Sources: TreeRL (ACL 2025), TreeRPO (2506.05183), SPO (2505.23564).
"""

import numpy as np

from treepo_async.tree.groups import Groups, sum_by
from treepo_async.tree.leaf_estimators import rloo
from treepo_async.tree.levels import Float64

SAME = 1e-12
"""Siblings whose values spread less, relative to the tree's largest reward, are equal but for rounding."""


def treerl(groups: Groups) -> Float64:
    """`((V - V(prompt)) + (V - V(parent))) / sqrt(leaves below)`, [L, D], NaN behind a leaf's end.

    V is the mean over the leaves below of the reward less the mean of the tree's other rewards. Leaves are counted by
    their weights relative to the tree's mean weight.
    """
    value_LK = groups.along(groups.mean_N(rloo(groups)))
    leaves_LK = groups.along(groups.weight_N / groups.weights_L.mean())
    value_LD, above_LD, prompt_L1 = value_LK[:, 1:], value_LK[:, :-1], value_LK[:, :1]
    return ((value_LD - prompt_L1) + (value_LD - above_LD)) / np.sqrt(leaves_LK[:, 1:])


def treerpo(groups: Groups) -> Float64:
    """`(V - mean) / std` among siblings, [L, D], NaN behind a leaf's end; V is the mean of the children.

    The standard deviation is the population's. An only child and siblings of equal value get 0.
    """
    child = groups.nodes
    parents, at = np.unique(groups.parent_N[child], return_inverse=True)
    value, weight = _child_means(groups)[child], _sibling_weights(groups)[child]
    total = sum_by(at, weight, len(parents))
    centred = value - (sum_by(at, weight * value, len(parents)) / total)[at]
    std = np.sqrt(sum_by(at, weight * centred**2, len(parents)) / total)[at]
    same = std <= SAME * np.abs(groups.rewards_L).max()
    score_N = np.zeros(len(groups.parent_N))
    score_N[child] = np.where(same, 0.0, centred) / np.where(same, 1.0, std)
    return groups.along(score_N)[:, 1:]


def spo(groups: Groups) -> Float64:
    """`V - V(parent)`, [L, D], NaN behind a leaf's end; V is the mean of the children."""
    value_LK = groups.along(_child_means(groups))
    return value_LK[:, 1:] - value_LK[:, :-1]


def _child_means(groups: Groups) -> Float64:
    """The reward of each leaf, and of every node above the weighted mean of its children, [N], bottom up."""
    value_N, weight_N = np.zeros(len(groups.parent_N)), _sibling_weights(groups)
    last_L = groups.nodes_LK.max(axis=1)  # numbers grow along a path
    value_N[last_L] = groups.rewards_L
    for column in reversed(range(1, groups.nodes_LK.shape[1])):
        passed = groups.passed_LK[:, column]
        child = np.unique(groups.nodes_LK[passed, column])
        parents, at = np.unique(groups.parent_N[child], return_inverse=True)
        weight = weight_N[child]
        total = sum_by(at, weight, len(parents))
        value_N[parents] = sum_by(at, weight * value_N[child], len(parents)) / total
    return value_N


def _sibling_weights(groups: Groups) -> Float64:
    """What each node counts among its siblings: 1 / inclusion over its own level, [N], the largest of them 1.

    The forks above them are the same for all siblings, so the weights of `path_weights` have no say here.
    """
    child, weight_N = groups.nodes, 1 / groups.inclusion_N
    parent, largest_N = groups.parent_N[child], np.zeros(len(weight_N))
    np.maximum.at(largest_N, parent, weight_N[child])
    weight_N[child] /= largest_N[parent]
    return weight_N
