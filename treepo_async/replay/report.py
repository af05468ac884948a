"""What replay tells the driver of a tree."""

import numpy as np

from treepo_async.metrics.events import emit
from treepo_async.tree.path_weights import leaf_weights
from treepo_async.types import Tree


def report_tree(tree: Tree, outcome: str) -> None:
    """Tell of every tree that came in: also those that are dropped cost tokens and have an accuracy."""
    weights_L = leaf_weights(tree, "unbiased")[tree.is_whole_L]
    known = tree.accuracies_L[np.isfinite(tree.accuracies_L)]
    cost = tree.provenance
    emit(
        "tree",
        outcome=outcome,
        actor=cost.actor,
        num_leaves=int(tree.is_whole_L.sum()),
        accuracy_sum=float(known.sum()),
        num_scored=len(known),
        decoded_tokens=cost.decoded_tokens,
        delivered_tokens=tree.num_delivered_tokens,
        wasted_tokens=cost.wasted_tokens,
        cached_tokens=cost.cached_tokens,
        prefix_tokens=cost.prefix_tokens,
        num_requests=cost.num_requests,
        overhead_s=cost.overhead_s,
        grow_s=cost.grow_s,
        num_fallbacks=cost.num_fallbacks,
        num_pruned=cost.num_pruned,
        saved_tokens=cost.saved_tokens,
        weight_sum=float(weights_L.sum()),
        weighted_tokens=float(weights_L @ tree.num_tokens_L[tree.is_whole_L]),
    )
