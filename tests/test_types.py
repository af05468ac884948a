import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.errors import TreeError, TreepoError
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Trajectory,
    Tree,
    leaves_of,
)


def segment(parent, level, token_ids, stop=None):
    return Segment(
        parent=parent,
        level=level,
        token_ids=np.array(token_ids, np.int32),
        behavior_logprobs=np.full(len(token_ids), -0.5, np.float32),
        policy_version=PolicyVersion(0, 1),
        stop=stop,
    )


def make_tree():
    """Grid 3; segment 2 goes on in the middle of level 1, as after an update of the weights.

    [1 2 3] -+- [4 5] - [6] - [9]
             +- [7 8]
    """
    return Tree(
        prompt=Prompt("p", np.array([11, 12], np.int32), "text", "answer"),
        segments=(
            segment(ROOT, 0, [1, 2, 3]),
            segment(0, 1, [4, 5]),
            segment(1, 1, [6]),
            segment(0, 1, [7, 8], StopReason.BOXED),
            segment(2, 2, [9], StopReason.EOS),
        ),
        rewards_L=np.array([1.0, np.nan], np.float32),
        accuracies_L=np.array([1.0, np.nan], np.float32),
        sampling=Sampling(1.0, segment_tokens=3, max_depth=3, width=2, branching_factor=2),
        provenance=Provenance("lease", "actor"),
    )


def test_leaves_paths_and_token_counts_follow_from_the_parents():
    tree = make_tree()
    tree.check()
    assert tree.leaves == leaves_of(tree.segments) == (3, 4)
    assert [tree.path(i) for i in (ROOT, 0, 3, 4)] == [(), (0,), (0, 3), (0, 1, 2, 4)]
    assert tree.num_tokens == 9
    assert tree.num_tokens_L.tolist() == [5, 7]
    assert tree.num_delivered_tokens == 12


def test_a_trajectory_is_the_tokens_of_its_path():
    tree = make_tree()
    assert Trajectory(tree, 0).token_ids.tolist() == [1, 2, 3, 7, 8]
    assert Trajectory(tree, 1).token_ids.tolist() == [1, 2, 3, 4, 5, 6, 9]
    assert [Trajectory(tree, leaf).stop for leaf in (0, 1)] == [StopReason.BOXED, StopReason.EOS]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_counts_of_random_trees_agree_with_their_trajectories(seed):
    tree = random_tree(np.random.default_rng(seed))
    trajectories = [Trajectory(tree, leaf).token_ids for leaf in range(len(tree.leaves))]
    assert tree.num_tokens_L.tolist() == [len(t) for t in trajectories]
    assert tree.num_delivered_tokens == sum(len(t) for t in trajectories)
    assert {i for leaf in tree.leaves for i in tree.path(leaf)} == set(range(len(tree.segments)))


def with_segment(index, **changes):
    def change(tree):
        segments = list(tree.segments)
        segments[index] = replace(segments[index], **changes)
        return replace(tree, segments=tuple(segments))

    return change


def with_sampling(**changes):
    return lambda tree: replace(tree, sampling=replace(tree.sampling, **changes))


def with_fields(**changes):
    return lambda tree: replace(tree, **changes)


BROKEN = {
    "prompt.token_ids is empty": lambda tree: replace(
        tree, prompt=replace(tree.prompt, token_ids=np.array([], np.int32))
    ),
    "segments is empty": with_fields(segments=()),
    "sampling.segment_tokens is 0": with_sampling(segment_tokens=0),
    "sampling.max_depth is -1": with_sampling(max_depth=-1),
    "sampling.width is 0": with_sampling(width=0),
    "sampling.branching_factor is 0": with_sampling(branching_factor=0),
    "sampling.temperature is 0": with_sampling(temperature=0.0),
    "sampling.temperature is nan": with_sampling(temperature=float("nan")),
    "sampling.temperature is inf": with_sampling(temperature=float("inf")),
    "segments[0].parent is 0": with_segment(0, parent=0),
    "segments[1].parent is 2": with_segment(1, parent=2),
    "segments[1].parent is -2": with_segment(1, parent=-2),
    "segments[4].parent 3 has ended": with_segment(4, parent=3),
    "segments[3].stop is None": with_segment(3, stop=None),
    "segments[3].stop is abort": with_segment(3, stop=StopReason.ABORT),
    "segments[4] has 0 token_ids and 0 behavior_logprobs": with_segment(
        4, token_ids=np.array([], np.int32), behavior_logprobs=np.array([], np.float32)
    ),
    "segments[1] has 2 token_ids and 1 behavior_logprobs": with_segment(
        1, behavior_logprobs=np.array([-1.0], np.float32)
    ),
    "segments[2].behavior_logprobs are not finite": with_segment(
        2, behavior_logprobs=np.array([np.nan], np.float32)
    ),
    "segments[4].behavior_logprobs are not finite": with_segment(
        4, behavior_logprobs=np.array([0.5], np.float32)
    ),
    "segments[3].behavior_logprobs are not finite": with_segment(
        3, behavior_logprobs=np.array([-1.0, -np.inf], np.float32)
    ),
    "segments[4].level is 1": with_segment(4, level=1),
    "segments[2].level is 2": with_segment(2, level=2),
    "segments[0].level is 0, but its tokens 0..2 lie on a grid of 2": with_sampling(
        segment_tokens=2
    ),
    "segments[4].level is 2, it must be below sampling.max_depth=2": with_sampling(max_depth=2),
    "rewards_L has 1 values, the tree has 2 leaves": with_fields(rewards_L=np.ones(1, "f4")),
    "accuracies_L has 3 values, the tree has 2 leaves": with_fields(accuracies_L=np.ones(3, "f4")),
    "rewards_L has an infinite value": with_fields(rewards_L=np.array([1, np.inf], "f4")),
    "accuracies_L has an infinite value": with_fields(accuracies_L=np.array([1, -np.inf], "f4")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_invariant_is_refused_by_the_name_of_its_field(message):
    with pytest.raises(TreeError, match=f"^{re.escape(message)}"):
        BROKEN[message](make_tree()).check()


def test_a_log_prob_may_be_above_zero_by_rounding_only():
    rounded = with_segment(4, behavior_logprobs=np.array([5e-5], np.float32))
    rounded(make_tree()).check()


@given(lineage=st.integers(0, 10**6), step=st.integers(0, 10**6))
def test_a_policy_version_reads_what_it_writes(lineage, step):
    version = PolicyVersion(lineage, step)
    assert PolicyVersion.parse(str(version)) == version


@pytest.mark.parametrize("text", ["", ".", "3", "3.", ".3", "0.1.2", "-1.0", "a.b", "0,1", " 0.1"])
def test_other_text_is_no_policy_version(text):
    with pytest.raises(ValueError, match=r"is not <lineage>\.<step>, e\.g\. 0\.12"):
        PolicyVersion.parse(text)


def test_policy_versions_are_ordered_by_lineage_then_step():
    versions = [PolicyVersion(1, 0), PolicyVersion(0, 9), PolicyVersion(0, 10)]
    assert sorted(versions) == [(0, 9), (0, 10), (1, 0)]


def test_a_tree_error_is_an_error_of_this_package_and_a_value_error():
    assert issubclass(TreeError, TreepoError)
    assert issubclass(TreeError, ValueError)
