from dataclasses import replace

import numpy as np
import pytest

from treepo_async.learner.summary import summarize
from treepo_async.types import (
    NO_LINEAGE,
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)


def segment(parent, level, num_tokens, step, stop=None):
    ids = np.full(num_tokens, 7, np.int32)
    return Segment(
        parent, level, ids, np.full(num_tokens, -1.0, np.float32), PolicyVersion(0, step), stop
    )


def tree(segments, rewards, accuracies):
    made = Tree(
        Prompt("p", np.array([1], np.int32), "", ""),
        tuple(segments),
        np.array(rewards, np.float32),
        np.array(accuracies, np.float32),
        Sampling(1.0, 4, 3, len(rewards), 2),
        Provenance("lease", "actor-0"),
    )
    made.check()
    return made


def test_a_batch_is_summed_up_over_leaves_and_tokens():
    forked = tree(
        [
            segment(ROOT, 0, 4, 5),
            segment(0, 1, 4, 6, StopReason.EOS),
            segment(0, 1, 2, 6, StopReason.EOS),
        ],
        [1.0, -1.0],
        [1.0, 0.0],
    )
    failed = tree([segment(ROOT, 0, 2, 4, StopReason.EOS)], [np.nan], [np.nan])

    assert summarize([forked, failed], PolicyVersion(0, 6)) == {
        "reward_mean": 0.0,
        "accuracy_mean": 0.5,
        "reward_errors": 1,
        "num_trees": 2,
        "num_trajectories": 3,
        "num_unique_tokens": 12,
        # trajectories of 8, 6 and 2 tokens
        "response_tokens_mean": pytest.approx(16 / 3),
        # 4 tokens one step old, 6 of none, 2 of two
        "staleness_mean": pytest.approx((4 * 1 + 6 * 0 + 2 * 2) / 12),
        "staleness_max": 2,
        "offline_share": 0.0,
    }


def test_trees_from_a_file_have_no_staleness_and_are_told_apart():
    version = PolicyVersion(NO_LINEAGE, 0)
    foreign = replace(segment(ROOT, 0, 4, 0, StopReason.EOS), policy_version=version)
    offline = tree([foreign], [1.0], [1.0])
    found = summarize([offline], PolicyVersion(0, 6))
    assert np.isnan([found["staleness_mean"], found["staleness_max"]]).all()
    assert found["offline_share"] == 1.0
    both = [offline, tree([segment(ROOT, 0, 2, 5, StopReason.EOS)], [1.0], [1.0])]
    found = summarize(both, PolicyVersion(0, 6))
    assert (found["staleness_mean"], found["staleness_max"]) == (1.0, 1)
    assert found["offline_share"] == pytest.approx(2 / 3)


def test_a_pruned_path_is_no_trajectory_and_no_reward_error():
    pruned = tree(
        [segment(ROOT, 0, 4, 5, StopReason.PRUNED), segment(ROOT, 0, 2, 6, StopReason.EOS)],
        [np.nan, 1.0],
        [np.nan, 1.0],
    )
    found = summarize([pruned], PolicyVersion(0, 6))
    assert (found["num_trajectories"], found["reward_errors"]) == (1, 0)
    assert found["staleness_max"] == 0, "the older tokens are not trained"
    assert (found["response_tokens_mean"], found["num_unique_tokens"]) == (2.0, 2)
