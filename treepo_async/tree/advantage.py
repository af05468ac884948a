"""What a trajectory, or each of its levels, is worth: its reward against the rewards of its tree.

Axis letters: `L` leaves, `D` grid levels of the tree. Neighbours: `levels` and `groups` are the view of a tree that
estimators work on, `leaf_estimators` and `segment_estimators` hold the formulas, `path_weights` says what a trajectory
counts, `whiten` is about the whole batch.

Invariant: everything is defined on grid levels, so segments may be cut anywhere without changing a bit of any result.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from treepo_async.config.schema import LEAVE_ONE_OUT
from treepo_async.errors import ConfigError
from treepo_async.tree.groups import Groups
from treepo_async.tree.leaf_estimators import grpo, rloo, tree_grpo, treepo
from treepo_async.tree.levels import Float64, Int64, Levels, level_tokens, num_levels
from treepo_async.tree.path_weights import weights_of
from treepo_async.tree.segment_estimators import spo, treerl, treerpo
from treepo_async.tree.whiten import whiten
from treepo_async.types import Tree

__all__ = ["advantages", "batch_advantages", "has_spread", "whiten"]

OF_TRAJECTORIES: dict[str, Callable[..., Float64]] = {
    "treepo": treepo,
    "treepo_size_weighted": partial(treepo, size_weighted=True),
    "treepo_subgroup_reject": partial(treepo, subgroup_reject=True),
    "treepo_size_weighted_subgroup_reject": partial(
        treepo, size_weighted=True, subgroup_reject=True
    ),
    "treepo_no_root": partial(treepo, no_root=True),
    "treepo_dedup_levels": partial(treepo, dedup_levels=True),
    "grpo": grpo,
    "rloo": rloo,
    "tree_grpo": tree_grpo,
}
"""From `Groups` to [L]."""
OF_SEGMENTS: dict[str, Callable[..., Float64]] = {
    "treerl": treerl,
    "treerpo": treerpo,
    "spo": spo,
}
"""From `Groups` to [L, D]."""

MakeGroups = Callable[[Levels, Float64, Float64], Groups]
"""(levels, rewards [L], weights [L]) -> groups, as `Groups.of`."""


def advantages(
    tree: Tree,
    estimator: str = "treepo",
    *,
    leave_one_out: bool = False,
    path_weights: str = "equal",
) -> Float64:
    """Advantages of one tree before whitening, [L]; of treerl, treerpo and spo [L, D], NaN behind a leaf's own last level.

    Leaves whose reward is NaN (scoring failed, or pruned) are in no group and get NaN. Below, "leaves" are the others, R
    is a reward, G_0 holds all leaves, and G_k those that share the first k levels of a path. A leaf is alone in its group
    behind its last fork.

    `treepo` (Eq. 5): the mean over levels k of `R - mean(G_k)`. A level k >= 1 counts if G_k has at least two leaves, also
    where no fork made it differ from the level above; without any fork below the prompt, G_0 alone is left. A lone leaf: R.
    `treepo_size_weighted` (Eq. 6): level k counts |G_k| times.
    `treepo_subgroup_reject` (Eq. 7), `treepo_size_weighted_subgroup_reject`: levels k >= 1 whose rewards are all equal do
    not count.
    `treepo_no_root`: level 0 counts only where no other level does.
    `treepo_dedup_levels`: a level without a fork, with the same leaves as the one above, does not count.
    `grpo`: `(R - mean(G_0)) / (std + 1e-6)`, std with n - 1. Forks do not matter. A lone leaf: `R / (1 + 1e-6)`.
    `rloo`: `R - mean(G_0 without the leaf)`. Forks do not matter. A lone leaf: 0.
    `tree_grpo`: `grpo` of G_0 plus `grpo` of G_1; a leaf alone in G_1 adds `R / (1 + 1e-6)`. A lone leaf: 0.

    Where each level has its own, V is the value of the node at its end:
    `treerl`: `((V - V(prompt)) + (V - V(parent))) / sqrt(leaves below)`, V the mean of their `rloo`. At a level without a
    fork the second difference is 0. A lone leaf: 0.
    `treerpo`: `(V - mean) / std` among siblings, std with n, V the mean of the children. At a level without a fork, or
    where all siblings are equal: 0. A lone leaf: 0.
    `spo`: `V - V(parent)`, V the mean of the children. At a level without a fork: 0. A lone leaf: 0.

    Weights w (`path_weights.leaf_weights`) make every mean and std a weighted one, and |G_k| and the number of leaves
    below a sum of relative weights; equal weights change no bit. A child counts 1 / its own inclusion, as the forks above
    are the same for all siblings. The result is multiplied by `w / mean(w of the leaves)`, so that the policy gradient of
    the tree is `sum_i w_i A_i grad log p_i`, but for one factor.

    Args:
        tree: any number of leaves from 1.
        estimator: a name in `config.schema.ESTIMATORS`.
        leave_one_out: means of groups leave the leaf itself out; treepo family and grpo, whose std remains that of all.
        path_weights: equal or unbiased.

    Raises:
        ConfigError: a name is unknown, or the estimator cannot leave one out.
    """
    values, weights_L = _estimate(tree, estimator, leave_one_out, path_weights)
    return _times(values, weights_L)


def batch_advantages(
    trees: Sequence[Tree],
    estimator: str,
    *,
    whitened: bool,
    leave_one_out: bool = False,
    path_weights: str = "equal",
    make_groups: Sequence[MakeGroups] | None = None,
) -> list[Float64]:
    """Advantages of every tree of a batch, [L] or [L, D] each.

    They are whitened before they are multiplied by the relative weights of their trajectories, over tokens that are
    weighted likewise: so the mean that whitening takes off is a baseline like any other, and the results have mean 0 over
    the tokens of the batch.

    Args:
        trees: the batch.
        estimator: as for `advantages`.
        whitened: whether they are.
        leave_one_out: as for `advantages`.
        path_weights: as for `advantages`.
        make_groups: per tree, groups whose means differ from those of `Groups.of`.
    """
    makers = make_groups or [Groups.of] * len(trees)
    estimates = [
        _estimate(tree, estimator, leave_one_out, path_weights, make)
        for tree, make in zip(trees, makers, strict=True)
    ]
    values = [values for values, _ in estimates]
    weights = [weights_L for _, weights_L in estimates]
    if whitened:
        tokens = [
            level_tokens(t) if v.ndim == 2 else t.num_tokens_L
            for t, v in zip(trees, values, strict=True)
        ]
        values = whiten(values, [_times(n, w) for n, w in zip(tokens, weights, strict=True)])
    return [_times(v, w) for v, w in zip(values, weights, strict=True)]


def has_spread(tree: Tree) -> bool:
    """Whether its leaves differ in accuracy (TreePO's dynamic sampling).

    A lone leaf counts as spread. Leaves whose scoring failed do not count; with none left there is no spread.
    """
    known = tree.accuracies_L[np.isfinite(tree.accuracies_L)]
    return len(known) > 0 and (int(tree.is_whole_L.sum()) == 1 or bool(known.max() > known.min()))


def _estimate(
    tree: Tree,
    estimator: str,
    leave_one_out: bool,
    path_weights: str,
    make_groups: MakeGroups = Groups.of,
) -> tuple[Float64, Float64]:
    """What an estimator gives, and the weights of the leaves relative to their mean over the scored ones, [L]."""
    estimate = _find(estimator, leave_one_out)
    levels, rewards_L = Levels.of(tree), tree.rewards_L.astype(np.float64)
    weights_L = weights_of(levels, path_weights)
    shape = (len(rewards_L), num_levels(tree)) if estimator in OF_SEGMENTS else (len(rewards_L),)
    values, scored = np.full(shape, np.nan), np.isfinite(rewards_L)
    if not scored.any():
        return values, np.ones(len(rewards_L))
    groups = make_groups(levels, rewards_L, weights_L)
    values[scored] = estimate(groups)
    relative_L = np.ones(len(rewards_L))
    relative_L[scored] = groups.weights_L / groups.weights_L.mean()
    return values, relative_L


def _find(estimator: str, leave_one_out: bool) -> Callable[[Groups], Float64]:
    implemented = OF_TRAJECTORIES | OF_SEGMENTS
    if estimator not in implemented:
        raise ConfigError(f"learner.estimator={estimator} is not one of {', '.join(implemented)}")
    if not leave_one_out:
        return implemented[estimator]
    if estimator not in LEAVE_ONE_OUT:
        raise ConfigError(
            f"learner.leave_one_out=true does not go with learner.estimator={estimator}; "
            f"give false, or one of {', '.join(LEAVE_ONE_OUT)}"
        )
    return partial(implemented[estimator], leave_one_out=True)


def _times(values: Float64 | Int64, weights_L: Float64) -> Float64:
    """Rows times weights; exactly the rows where the weights are 1."""
    return values * (weights_L if values.ndim == 1 else weights_L[:, None])
