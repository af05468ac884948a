"""Corrected values against a slow loop, and exactly the plain ones where the policy did not change."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learner.loss.test_policy import cut_in_two
from tests.oracle import SlowEstimators, random_tree, with_pruning
from treepo_async.config.loss_rules import VTRACE
from treepo_async.learner.loss.values import corrected_groups
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion

SEEDS = st.integers(0, 2**32 - 1)
VERSION = PolicyVersion(0, 4)


def grown(seed, **kind):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, num_segments=int(rng.integers(1, 16)), nan_share=0.2, **kind)
    return with_pruning(tree, rng), rng


def near(tree, rng, spread=0.5):
    """Log-probs of a policy not far off; NaN where no pass would compute any."""
    scored = {
        i
        for leaf, reward in zip(tree.leaves, tree.rewards_L, strict=True)
        for i in tree.path(leaf)
        if not math.isnan(reward)
    }
    return [
        (s.behavior_logprobs + spread * rng.normal(size=len(s))).astype(np.float32)
        if i in scored
        else np.full(len(s), np.nan, np.float32)
        for i, s in enumerate(tree.segments)
    ]


def found(trees, estimator, proximal, *, cap=1.0, correct_fresh=False, whitened=False, **kind):
    makers = corrected_groups(trees, proximal, VERSION, cap=cap, correct_fresh=correct_fresh)
    return batch_advantages(trees, estimator, whitened=whitened, make_groups=makers, **kind)


def slow(tree, estimator, proximal, cap, path_weights):
    """Advantages whose means weigh each leaf by the capped ratios of the levels below the group's node."""
    base = SlowEstimators(tree, path_weights=path_weights)
    if not base.scored:
        return np.full(len(tree.leaves), np.nan)
    token = {
        (i, k): 0.0
        if segment.policy_version == VERSION and not segment.mixed_context
        else float(proximal[i][k]) - float(segment.behavior_logprobs[k])
        for i, segment in enumerate(tree.segments)
        for k in range(len(segment))
    }

    def share(leaf, level):
        product = 1.0
        for below in range(level, base.depth(leaf)):
            values = [token[t] for t in base.tokens[leaf][below * base.grid :][: base.grid]]
            product *= min(cap, math.exp(sum(values) / len(values)))
        return product

    def mean(leaves, level):
        weights = [base.weights[i] * share(i, level) for i in leaves]
        return sum(w * base.rewards[i] for w, i in zip(weights, leaves, strict=True)) / sum(weights)

    result = np.full(len(tree.leaves), np.nan)
    average = sum(base.weights[i] for i in base.scored) / len(base.scored)
    for leaf in base.scored:
        reward, terms = base.rewards[leaf], []
        for level in range(base.depth(leaf)):
            group = base.group(base.node(leaf, level))
            if len(group) > 1:
                terms.append(reward - mean(group, level))
        value = sum(terms) / len(terms) if terms else reward
        if estimator == "grpo" and len(base.scored) > 1:
            root, n = mean(base.scored, 0), len(base.scored)
            total = sum(base.weights[i] for i in base.scored)
            squares = sum(base.weights[i] * (base.rewards[i] - root) ** 2 for i in base.scored)
            value = (reward - root) / (math.sqrt(squares / total * n / (n - 1)) + 1e-6)
        elif estimator == "grpo":
            value = reward / (1 + 1e-6)
        result[leaf] = value * base.weights[leaf] / average
    return result


@pytest.mark.parametrize("estimator", ["treepo", "grpo"])
@pytest.mark.parametrize("path_weights", ["equal", "unbiased"])
@given(seed=SEEDS, cap=st.sampled_from([0.7, 1.0, 1.5]))
@settings(max_examples=30, deadline=None)
def test_corrected_advantages_are_those_of_a_slow_loop(estimator, path_weights, seed, cap):
    tree, rng = grown(seed)
    proximal = near(tree, rng)
    (advantages,) = found([tree], estimator, [proximal], cap=cap, path_weights=path_weights)
    expected = slow(tree, estimator, proximal, cap, path_weights)
    np.testing.assert_allclose(advantages, expected, rtol=1e-9, atol=1e-9)


def test_control_the_correction_changes_advantages():
    tree, rng = grown(3)
    plain = batch_advantages([tree], "treepo", whitened=False)[0]
    corrected = found([tree], "treepo", [near(tree, rng)])[0]
    assert np.nanmax(np.abs(plain - corrected)) > 0.01


@pytest.mark.parametrize("estimator", VTRACE)
@given(seed=SEEDS, whitened=st.booleans())
@settings(max_examples=20, deadline=None)
def test_where_the_policy_did_not_change_every_advantage_is_exactly_the_plain_one(
    estimator, seed, whitened
):
    trees = [grown(seed + i)[0] for i in range(3)]
    same = [[s.behavior_logprobs for s in tree.segments] for tree in trees]
    for path_weights in ("equal", "unbiased"):
        kind = {"whitened": whitened, "path_weights": path_weights}
        plain = batch_advantages(trees, estimator, **kind)
        for cap in (1.0, 2.0):
            corrected = found(trees, estimator, same, cap=cap, **kind)
            for one, other in zip(plain, corrected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_fresh_tokens_change_no_value_unless_they_are_to_be_corrected():
    tree, rng = grown(3, versions=(VERSION,), mixed_share=0.0)
    plain = batch_advantages([tree], "treepo", whitened=False)[0]
    proximal = near(tree, rng)
    np.testing.assert_array_equal(found([tree], "treepo", [proximal])[0], plain)
    corrected = found([tree], "treepo", [proximal], correct_fresh=True)[0]
    assert not np.allclose(corrected, plain, equal_nan=True)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_where_a_segment_is_cut_changes_no_value(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, forks_on_grid=True, versions=(PolicyVersion(0, 1),))
    proximal, cut = near(tree, rng), cut_in_two(tree)
    pieces = [p for v in proximal for p in ((v[:1], v[1:]) if len(v) > 1 else (v,))]
    one, other = found([tree], "treepo", [proximal]), found([cut], "treepo", [pieces])
    np.testing.assert_allclose(one[0], other[0], rtol=1e-12, atol=1e-12)


def test_a_value_follows_the_leaves_that_became_more_likely():
    """Two paths of one level, rewards 1 and 0: the ratio of the first is e^-1, so V = e^-1 / (e^-1 + 1) instead of 1/2."""
    tree = random_tree(np.random.default_rng(0), num_segments=2, max_depth=1, mixed_share=0.0)
    old = [
        replace(s, parent=-1, level=0, policy_version=PolicyVersion(0, 1)) for s in tree.segments
    ]
    tree = replace(
        tree,
        segments=tuple(replace(s, stop=tree.segments[-1].stop) for s in old),
        rewards_L=np.array([1.0, 0.0], np.float32),
    )
    proximal = [old[0].behavior_logprobs - 1, old[1].behavior_logprobs + 3]
    value = math.exp(-1) / (math.exp(-1) + 1)
    assert found([tree], "treepo", [proximal])[0] == pytest.approx([1 - value, -value])
