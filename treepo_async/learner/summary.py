"""What a batch of trees looks like to the learner: reward, accuracy, staleness, size."""

from collections.abc import Sequence
from math import nan

import numpy as np

from treepo_async.types import NO_LINEAGE, PolicyVersion, Tree


def summarize(trees: Sequence[Tree], version: PolicyVersion) -> dict[str, float]:
    """Numbers about a batch.

    Args:
        trees: the batch.
        version: of the weights that train on it; staleness counts from it.

    Returns:
        Means over trajectories, pruned paths left out here and below, for reward, accuracy and response length;
        staleness over segments, weighted with their tokens, and its maximum; the share of the tokens that no run of weights sampled,
        which have no staleness (NaN where there are no others).
    """
    rewards = np.concatenate([tree.rewards_L[tree.is_whole_L] for tree in trees])
    accuracies = np.concatenate([tree.accuracies_L[tree.is_whole_L] for tree in trees])
    lengths = np.concatenate([tree.num_tokens_L[tree.is_whole_L] for tree in trees])
    segments = [segment for tree in trees for segment in tree.whole_segments]
    tokens = np.array([len(segment) for segment in segments])
    sampled_here = np.array([s.policy_version.lineage != NO_LINEAGE for s in segments])
    staleness = np.array([version.step - segment.policy_version.step for segment in segments])
    here = int(tokens[sampled_here].sum())
    return {
        "reward_mean": float(np.nanmean(rewards)),
        "accuracy_mean": float(np.nanmean(accuracies)),
        "reward_errors": int(np.isnan(rewards).sum()),
        "num_trees": len(trees),
        "num_trajectories": len(rewards),
        "num_unique_tokens": int(tokens.sum()),
        "response_tokens_mean": float(lengths.mean()),
        "staleness_mean": float((staleness * tokens)[sampled_here].sum() / here) if here else nan,
        "staleness_max": int(staleness[sampled_here].max()) if here else nan,
        "offline_share": 1 - here / int(tokens.sum()),
    }
