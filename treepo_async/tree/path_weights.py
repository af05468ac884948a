"""What a trajectory counts: how many paths it stands for.

Axis letters as in `levels`. A tree's leaves are no sample from the policy: a path that survives inherits the forks of
those that ended early, and is counted once for each. All weights here follow from the tree alone; nothing is estimated.
"""

import numpy as np

from treepo_async.config.schema import PATH_WEIGHTS
from treepo_async.errors import ConfigError
from treepo_async.tree.levels import BEHIND, Float64, Levels
from treepo_async.types import Tree


def leaf_weights(tree: Tree, path_weights: str = "equal") -> Float64:
    """The weight of each trajectory, [L], those of pruned and unscored leaves too.

    `equal`: the product over its path of 1 / `inclusion`, so that a path that was let go on stands for those that were
    pruned in the same case (Horvitz-Thompson). It is 1 where pruning left nothing to chance.

    `unbiased`: that, times the path's probability under the tree's forks, 1 / number of children at each node. Children
    are counted by grid level, those of the prompt included; a child that was pruned or could not be scored is one too.
    Then the sum of `w_i * f(leaf i)`, pruned leaves left out, has the expectation of f under independent sampling,
    provided that the number of children of a node was decided before any of them was sampled, and that pruning left
    every path a chance. First fork and budget transfer do so. A fallback does not: it adds children to a node because
    of how earlier ones ended, so trees with fallback forks keep some bias.

    Raises:
        ConfigError: `path_weights` is neither.
    """
    return weights_of(Levels.of(tree), path_weights)


def weights_of(levels: Levels, path_weights: str) -> Float64:
    """`leaf_weights` of a tree whose levels are known, [L]."""
    if path_weights not in PATH_WEIGHTS:
        raise ConfigError(
            f"learner.path_weights={path_weights} is not one of {', '.join(PATH_WEIGHTS)}"
        )
    passed_LD = levels.nodes_LD != BEHIND
    probability_N = levels.inclusion_N
    if path_weights == "unbiased":
        parents = levels.parent_N[np.unique(levels.nodes_LD[passed_LD])]
        num_children_N = np.bincount(parents, minlength=len(probability_N))
        probability_N = probability_N * num_children_N[levels.parent_N]
    weight_L: Float64 = 1 / np.where(passed_LD, probability_N[levels.nodes_LD], 1.0).prod(axis=1)
    return weight_L
