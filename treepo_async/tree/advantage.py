"""What a leaf is worth: its reward against its groups at every ancestor (TreePO, Eq. 3-5).

Axis letters: `L` leaves. Leaves whose reward is NaN take part in no group and get NaN.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import ConfigError
from treepo_async.types import Tree

Float64 = NDArray[np.float64]


def advantages(tree: Tree, estimator: str = "treepo") -> Float64:
    """One advantage per leaf, [L], before whitening.

    `treepo`: the mean over the leaf's levels k of `R - mean(R of G_k)`, where G_0 holds all leaves and G_k those
    that share the path's first k levels. Levels count once each, also where two have the same leaves; a level
    k >= 1 at which the leaf is alone does not count, so without any fork only the root term is left. A lone leaf
    has no group to compare with: its advantage is its reward.

    Raises:
        ConfigError: the estimator has no implementation.
    """
    if estimator != "treepo":
        raise ConfigError(f"learner.estimator={estimator} is not one of treepo")
    groups, rewards_L = _groups(tree), tree.rewards_L.astype(np.float64)
    result = np.full(len(tree.leaves), np.nan)
    for leaf, reward in enumerate(rewards_L):
        terms = [
            reward - (np.mean(rewards_L[members]) if len(members) > 1 else 0.0)
            for level, members in enumerate(groups[leaf])
            if level == 0 or len(members) > 1
        ]
        if terms:
            result[leaf] = np.mean(terms)
    return result


def whiten(
    advantages_L: Sequence[Float64], num_tokens_L: Sequence[NDArray[np.int64]]
) -> list[Float64]:
    """Advantages of a batch of trees to mean 0 and variance 1 over its trajectory tokens.

    Each leaf counts with its response tokens, so that a token shared by k trajectories counts k times; the
    variance has the N - 1 of REINFORCE++ and 1e-8 is added to it. NaN stays NaN and does not count. A batch of
    fewer than two tokens has no variance and is given back as it is.

    Args:
        advantages_L: per tree, [L].
        num_tokens_L: per tree, response tokens of each leaf, [L].
    """
    values = np.concatenate(advantages_L)
    weights = np.concatenate(num_tokens_L).astype(np.float64)
    counted = np.isfinite(values)
    total = weights[counted].sum()
    if total < 2:
        return list(advantages_L)
    mean = (weights * values)[counted].sum() / total
    variance = (weights * (values - mean) ** 2)[counted].sum() / (total - 1)
    return [(a - mean) / np.sqrt(variance + 1e-8) for a in advantages_L]


def batch_advantages(trees: Sequence[Tree], estimator: str, *, whitened: bool) -> list[Float64]:
    """Advantages of every tree of a batch, [L] each."""
    raw = [advantages(tree, estimator) for tree in trees]
    return whiten(raw, [tree.num_tokens_L for tree in trees]) if whitened else raw


def has_spread(tree: Tree) -> bool:
    """Whether its leaves differ in accuracy (TreePO's dynamic sampling).

    A lone leaf counts as spread. Leaves whose scoring failed do not count; with none left there is no spread.
    """
    known = tree.accuracies_L[np.isfinite(tree.accuracies_L)]
    return len(known) > 0 and (len(tree.leaves) == 1 or bool(known.max() > known.min()))


def _groups(tree: Tree) -> list[list[list[int]]]:
    """Per leaf, per level 0..d-1 of its path, the leaves that share the path up to there; NaN leaves left out."""
    shared: list[list[int]] = []
    members: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for leaf, segment in enumerate(tree.leaves):
        ends = {tree.segments[i].level: i for i in tree.path(segment)}
        ancestors = [-1, *(ends[level] for level in range(tree.segments[segment].level))]
        shared.append(ancestors)
        if np.isfinite(tree.rewards_L[leaf]):
            for level, ancestor in enumerate(ancestors):
                members[level, ancestor].append(leaf)
    return [
        [members[key] for key in enumerate(ancestors)] if np.isfinite(tree.rewards_L[leaf]) else []
        for leaf, ancestors in enumerate(shared)
    ]
