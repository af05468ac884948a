"""Batches and their shares, as rank 0 makes them."""

from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.share import Share


def batch_of(trees, advantages, *, proximal=(), reference=(), normalizer="token_mean"):
    """All trees of one update."""
    weights = loss_weights(trees, advantages, normalizer, response_limit=100)
    return Share(
        trees=tuple(trees),
        advantages=tuple(advantages),
        weights=tuple(weights),
        proximal=tuple(map(tuple, proximal)),
        reference=tuple(map(tuple, reference)),
    )


def share_of(trees, advantages, *, budget_tokens=10**6, **known):
    """The share of the only replica."""
    batch = batch_of(trees, advantages, **known)
    (share,) = divide(batch, num_replicas=1, budget_tokens=budget_tokens)
    return share
