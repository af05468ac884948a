"""The weights against the exact expectation of a small policy, over many trees that are grown from it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.oracle import SlowEstimators, random_tree, with_pruning
from tests.tree.vectors import recut, vector
from treepo_async.config.schema import PATH_WEIGHTS
from treepo_async.tree.path_weights import leaf_weights
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)

GRID, DEPTH, WIDTH, NUM_TREES = 2, 4, 8, 1500
ENDS = (0.05, 0.45)
"""The policy: a state, 0 or 1, in which a token is the last one with this probability ..."""
TURNS = (0.4, 0.3)
"""... and else the state is left with this one."""


def expected_tokens(state=0, left=GRID * DEPTH):
    """Mean length of a trajectory, exactly."""
    if left == 1:
        return 1.0
    turned = TURNS[state] * expected_tokens(1 - state, left - 1)
    stayed = (1 - TURNS[state]) * expected_tokens(state, left - 1)
    return 1 + (1 - ENDS[state]) * (turned + stayed)


def sample_level(rng, state):
    """(tokens, state after them, whether the trajectory ended)."""
    for num_tokens in range(1, GRID + 1):
        if rng.random() < ENDS[state]:
            return num_tokens, state, True
        state = 1 - state if rng.random() < TURNS[state] else state
    return GRID, state, False


def grow(rng, *, goes_on=1.0):
    """A tree whose forks double, with those of ended paths given to the survivors, each decided before its children.

    A path that stands in state 1 is judged, and goes on with the given probability.
    """
    segments, frontier, num_ended, freed = [], [(ROOT, 0)], 0, 0
    for level in range(DEPTH):
        budget = max(len(frontier), min(WIDTH - num_ended, 2 * (len(frontier) + freed)))
        parents = [frontier[i % len(frontier)] for i in range(budget)] if frontier else []
        frontier, freed = [], 0
        for parent, state in parents:
            num_tokens, state, ended = sample_level(rng, state)
            stop, inclusion = StopReason.EOS if ended else None, 1.0
            if not ended and level == DEPTH - 1:
                stop = StopReason.LENGTH
            elif not ended and state == 1:
                inclusion = goes_on if rng.random() < goes_on else 1.0
                stop = None if inclusion == goes_on else StopReason.PRUNED
            segments.append(
                Segment(
                    parent=parent,
                    level=level,
                    token_ids=np.ones(num_tokens, np.int32),
                    behavior_logprobs=np.full(num_tokens, -1.0, np.float32),
                    policy_version=PolicyVersion(0, 0),
                    stop=stop,
                    inclusion=inclusion,
                )
            )
            if stop is None:
                frontier.append((len(segments) - 1, state))
            freed += stop is not None
            num_ended += stop is StopReason.EOS
    zeros_L = np.zeros(sum(s.stop is not None for s in segments), np.float32)
    tree = Tree(
        prompt=Prompt("p", np.array([1], np.int32), "", ""),
        segments=tuple(segments),
        rewards_L=zeros_L,
        accuracies_L=zeros_L,
        sampling=Sampling(1.0, GRID, DEPTH, WIDTH, 2),
        provenance=Provenance("lease", "actor"),
    )
    tree.check()
    return tree


def errors_of(estimates):
    """How many standard errors the mean of the estimates lies away from the exact expectation."""
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    return abs(np.mean(estimates) - expected_tokens()) / error


def kept(tree):
    return np.array([tree.segments[i].stop is not StopReason.PRUNED for i in tree.leaves])


def weighted_tokens(tree, weights_L):
    return float((weights_L * tree.num_tokens_L)[kept(tree)].sum())


def mean_tokens(tree):
    return float(tree.num_tokens_L[kept(tree)].mean())


def trees(**options):
    rng = np.random.default_rng(0)
    return [grow(rng, **options) for _ in range(NUM_TREES)]


def test_sums_with_unbiased_weights_have_the_expectation_of_independent_sampling():
    estimates = [weighted_tokens(tree, leaf_weights(tree, "unbiased")) for tree in trees()]
    assert errors_of(estimates) < 4


def test_control_equal_weights_count_long_trajectories_too_often():
    estimates = [mean_tokens(tree) for tree in trees()]
    assert errors_of(estimates) > 8
    assert np.mean(estimates) > expected_tokens()


@pytest.mark.parametrize("goes_on", [0.7, 0.3])
def test_sums_stay_unbiased_when_paths_are_pruned_by_chance(goes_on):
    estimates = [
        weighted_tokens(tree, leaf_weights(tree, "unbiased")) for tree in trees(goes_on=goes_on)
    ]
    assert errors_of(estimates) < 4


def test_control_without_the_chances_to_go_on_pruned_paths_are_missed():
    def forget(tree):
        return replace(tree, segments=tuple(replace(s, inclusion=1.0) for s in tree.segments))

    estimates = [
        weighted_tokens(tree, leaf_weights(forget(tree), "unbiased")) for tree in trees(goes_on=0.7)
    ]
    assert errors_of(estimates) > 8


@pytest.mark.parametrize("path_weights", PATH_WEIGHTS)
@pytest.mark.parametrize("seed", range(20))
def test_weights_agree_with_their_definition_on_tokens_and_ignore_cuts(seed, path_weights):
    rng = np.random.default_rng(seed)
    tree = with_pruning(random_tree(rng, num_segments=25, nan_share=0.2), rng)
    found = leaf_weights(tree, path_weights)
    expected = SlowEstimators(tree, path_weights=path_weights).weights
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert np.array_equal(leaf_weights(recut(tree, rng), path_weights), found)


def test_weights_are_one_where_nothing_was_left_to_chance():
    assert leaf_weights(vector("C3_ragged_early_stop")).tolist() == [1.0] * 4


def test_unbiased_weights_are_the_probabilities_of_the_forks():
    tree = vector("C3_ragged_early_stop")
    assert leaf_weights(tree, "unbiased").tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 8]


def test_a_pruned_or_unscored_leaf_is_a_child_of_its_fork():
    tree = vector("C3_ragged_early_stop")
    segments = list(tree.segments)
    segments[0] = replace(segments[0], stop=StopReason.PRUNED)
    rewards_L = np.array([np.nan, np.nan, 1, 0], np.float32)
    found = leaf_weights(replace(tree, segments=tuple(segments), rewards_L=rewards_L), "unbiased")
    assert found.tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 8]


def test_a_chance_to_go_on_counts_behind_its_segment_alone():
    tree = vector("C3_ragged_early_stop")
    judged = replace(tree.segments[1], inclusion=0.5)
    tree = replace(tree, segments=(tree.segments[0], judged, *tree.segments[2:]))
    assert leaf_weights(tree).tolist() == [1.0, 2.0, 2.0, 2.0]
