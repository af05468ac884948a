"""What a token of a trajectory weighs in the loss: the normalizer, global over the batch, as a weight.

Neighbours: `team` makes the weights on rank 0, `pack` sums them over the trajectories through a token. Pure numpy.
"""

from collections.abc import Sequence

import numpy as np

from treepo_async.learner.geometry import Float64
from treepo_async.learner.piece import counted_leaves
from treepo_async.types import Tree


def loss_weights(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    normalizer: str,
    *,
    response_limit: int,
) -> list[Float64]:
    """Weights of every tree's trajectories, [L] or [L, D] each, divided by the normalizer of all of them.

    Args:
        trees: the batch, or the part of it that one update trains on.
        advantages: per tree [L] or [L, D]; a NaN leaves a trajectory out.
        normalizer: a name in `config.schema.NORMALIZERS`.
        response_limit: longest response possible, in tokens (`dr_grpo`).
    """
    counted = [list(counted_leaves(values)) for values in advantages]
    total = sum(int(t.num_tokens_L[c].sum()) for t, c in zip(trees, counted, strict=True))
    return [np.full(len(tree.leaves), 1 / max(total, 1)) for tree in trees]
