"""Numbers of a batch that masks read, against slow loops over all tokens of all trajectories."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.learner.packing.bounds import Bounds, bounds_of, is_fresh
from treepo_async.types import PolicyVersion

SEEDS = st.integers(0, 2**32 - 1)
VERSION = PolicyVersion(0, 4)


def batch(seed, *, nan_share=0.2, **kind):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, nan_share=nan_share, **kind) for _ in range(3)]
    proximal = [
        [(s.behavior_logprobs + rng.normal(0, 0.3, len(s))).astype(np.float32) for s in t.segments]
        for t in trees
    ]
    return trees, [tree.rewards_L.astype(np.float64) for tree in trees], proximal


def tokens(trees, advantages, proximal, *, correct_fresh):
    """(log-ratio, whether fresh) of every token of every counted trajectory."""
    found = []
    for tree, rewards, of_tree in zip(trees, advantages, proximal, strict=True):
        for leaf, reward in zip(tree.leaves, rewards, strict=True):
            for i in tree.path(leaf) if not math.isnan(reward) else ():
                segment = tree.segments[i]
                fresh = segment.policy_version == VERSION and not segment.mixed_context
                for p, mu in zip(of_tree[i], segment.behavior_logprobs, strict=True):
                    is_zero = fresh and not correct_fresh
                    found.append((0.0 if is_zero else float(p) - float(mu), fresh))
    return found


@given(SEEDS, st.booleans(), st.floats(0.001, 0.2))
@settings(max_examples=40, deadline=None)
def test_bounds_are_those_of_a_slow_loop(seed, correct_fresh, mean_square):
    case = batch(seed)
    found = bounds_of(*case, VERSION, mean_square=mean_square, correct_fresh=correct_fresh)
    rows = tokens(*case, correct_fresh=correct_fresh)
    stale = [d for d, fresh in rows if not fresh]
    assert found.log_ratio_std == pytest.approx(np.std(stale) if stale else math.nan, nan_ok=True)
    kept = [d * d for d, _ in rows if d * d <= found.largest_square]
    dropped = [d * d for d, _ in rows if d * d > found.largest_square]
    assert not kept or np.mean(kept) <= mean_square * (1 + 1e-9)
    if dropped:
        smallest = [d for d in dropped if d == min(dropped)]
        assert np.mean(kept + smallest) > mean_square, "as few as possible"
        assert found.largest_square < min(dropped) * (1 - 1e-12), "no token is at the bound"


def test_fresh_tokens_count_in_the_mean_square_of_m2po():
    trees, advantages, proximal = batch(2, nan_share=0.0, versions=(VERSION,), mixed_share=0.5)
    stale = [
        d for d, fresh in tokens(trees, advantages, proximal, correct_fresh=False) if not fresh
    ]
    tau = float(np.mean(np.square(stale))) * 0.9
    bounds = bounds_of(trees, advantages, proximal, VERSION, mean_square=tau, correct_fresh=False)
    assert bounds.largest_square == math.inf, "with the zeros of fresh tokens the mean is below"


def test_everything_is_kept_when_everything_is_fresh_and_nothing_when_all_is_too_far_off():
    trees, advantages, proximal = batch(1, versions=(VERSION,), mixed_share=0.0)
    case = trees, advantages, proximal, VERSION
    bounds = bounds_of(*case, mean_square=1e-9, correct_fresh=False)
    assert math.isnan(bounds.log_ratio_std)
    assert bounds.largest_square == math.inf
    far = [[s.behavior_logprobs + np.float32(2) for s in t.segments] for t in trees]
    bounds = bounds_of(trees, advantages, far, VERSION, mean_square=0.1, correct_fresh=True)
    assert 0 < bounds.largest_square < 4


def test_a_batch_with_nothing_counted_has_the_bounds_that_mask_nothing():
    trees, advantages, proximal = batch(1, nan_share=1.0)
    found = bounds_of(trees, advantages, proximal, VERSION, mean_square=0.1, correct_fresh=False)
    assert math.isnan(found.log_ratio_std)
    assert found.largest_square == Bounds().largest_square == math.inf


def test_a_cache_of_several_versions_makes_a_segment_stale():
    tree = random_tree(np.random.default_rng(0), versions=(VERSION,), mixed_share=0.5)
    assert [is_fresh(s, VERSION) for s in tree.segments] == [
        not s.mixed_context for s in tree.segments
    ]
    assert not any(is_fresh(s, PolicyVersion(1, 4)) for s in tree.segments)
