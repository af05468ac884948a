"""Batches and their shares, as rank 0 makes them."""

from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.share import Share


def batch_of(trees, advantages, *, proximal=None, reference=None, normalizer="token_mean"):
    """All trees of one update."""
    weights = loss_weights(trees, advantages, normalizer)
    return Share(
        trees=tuple(trees),
        advantages=tuple(advantages),
        weights=tuple(weights),
        proximal=None if proximal is None else tuple(map(tuple, proximal)),
        reference=None if reference is None else tuple(map(tuple, reference)),
    )


def share_of(trees, advantages, *, budget_tokens=10**6, **known):
    """The share of the only replica."""
    batch = batch_of(trees, advantages, **known)
    (share,) = divide(batch, num_replicas=1, budget_tokens=budget_tokens)
    return share
