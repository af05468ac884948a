"""What a batch of trees looks like to the learner: reward, accuracy, staleness, size."""

from collections.abc import Sequence

import numpy as np

from treepo_async.types import PolicyVersion, Tree


def summarize(trees: Sequence[Tree], version: PolicyVersion) -> dict[str, float]:
    """Numbers about a batch.

    Args:
        trees: the batch.
        version: of the weights that train on it; staleness counts from it.

    Returns:
        Means over leaves for reward, accuracy and response length; staleness over segments, weighted with their
        tokens, and its maximum.
    """
    rewards = np.concatenate([tree.rewards_L for tree in trees])
    accuracies = np.concatenate([tree.accuracies_L for tree in trees])
    lengths = np.concatenate([tree.num_tokens_L for tree in trees])
    segments = [segment for tree in trees for segment in tree.segments]
    tokens = np.array([len(segment) for segment in segments])
    staleness = np.array([version.step - segment.policy_version.step for segment in segments])
    return {
        "reward_mean": float(np.nanmean(rewards)),
        "accuracy_mean": float(np.nanmean(accuracies)),
        "reward_errors": int(np.isnan(rewards).sum()),
        "num_trees": len(trees),
        "num_trajectories": len(rewards),
        "num_unique_tokens": int(tokens.sum()),
        "response_tokens_mean": float(lengths.mean()),
        "staleness_mean": float((staleness * tokens).sum() / tokens.sum()),
        "staleness_max": int(staleness.max()),
    }
