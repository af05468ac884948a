"""What a token of a trajectory weighs in the loss: the normalizer, global over an update, as a weight.

With n_i the tokens of trajectory i and G the number of trajectories, pruned and unscored ones left out:

    token_mean      1 / sum of n_i                          every token of every trajectory the same (DAPO)
    sequence_mean   1 / (G n_i)                             every trajectory the same (GRPO)
    dr_grpo         1 / (G * segment_tokens * max_depth)    a constant, so that length has no say (Dr. GRPO)
    unique_token    1 / (mult * U)                          every unique token the same: mult trajectories share it, and U is the number
                                                            of unique tokens

All but `dr_grpo` make the weights over the tokens of all trajectories sum to 1. `mult` is that of the trajectory's node on a grid
level: trees fork at the end of levels only. It is counted in the whole tree, before it is split into pieces.

Neighbours: `batch` makes the weights on rank 0, `pack` sums them over the trajectories through a token. Pure numpy.

Invariant: corrections and masks have no say in it.
"""

from collections.abc import Sequence

import numpy as np

from treepo_async.errors import ConfigError
from treepo_async.learner.packing.geometry import Float64
from treepo_async.learner.packing.piece import counted_leaves
from treepo_async.tree.levels import BEHIND, Int64, Levels, level_tokens
from treepo_async.types import Tree


def loss_weights(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    normalizer: str,
) -> list[Float64]:
    """Weights of every tree's trajectories, [L] or [L, D] each, divided by the normalizer of all of them.

    Those of trajectories that are not trained are any finite number. Without any that is trained, all are.

    Args:
        trees: the batch, or the part of it that one update trains on.
        advantages: per tree [L] or [L, D]; a NaN leaves a trajectory out.
        normalizer: a name in `config.schema.NORMALIZERS`.

    Raises:
        ConfigError: the normalizer is unknown.
    """
    counted = [list(counted_leaves(values)) for values in advantages]
    num_trajectories = max(1, sum(map(len, counted)))
    match normalizer:
        case "token_mean":
            total = sum(int(t.num_tokens_L[c].sum()) for t, c in zip(trees, counted, strict=True))
            return [np.full(len(tree.leaves), 1 / max(total, 1)) for tree in trees]
        case "sequence_mean":
            return [1 / (num_trajectories * tree.num_tokens_L) for tree in trees]
        case "dr_grpo":
            return [
                np.full(len(tree.leaves), 1 / (num_trajectories * _response_limit(tree)))
                for tree in trees
            ]
        case "unique_token":
            return _unique(trees, counted)
    raise ConfigError(f"learner.normalizer={normalizer} is unknown")


def _response_limit(tree: Tree) -> int:
    """Most response tokens of a trajectory under the rules the tree grew by."""
    return tree.sampling.segment_tokens * tree.sampling.max_depth


def _unique(trees: Sequence[Tree], counted: Sequence[Sequence[int]]) -> list[Float64]:
    shares = [1 / _sharing(tree, c) for tree, c in zip(trees, counted, strict=True)]
    total = sum(
        float((level_tokens(tree) * share)[c].sum())
        for tree, share, c in zip(trees, shares, counted, strict=True)
    )
    return [share / max(total, 1.0) for share in shares]


def _sharing(tree: Tree, counted: Sequence[int]) -> Int64:
    """Counted trajectories through each trajectory's node on each level, [L, D]; 1 where there is none."""
    nodes_LD = Levels.of(tree).nodes_LD
    chosen = nodes_LD[list(counted)]
    size_N = np.bincount(chosen[chosen != BEHIND], minlength=len(tree.segments) + 1)
    return np.maximum(np.where(nodes_LD == BEHIND, 1, size_N[nodes_LD]), 1)
