from dataclasses import replace
from functools import partial
from operator import attrgetter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree, with_pruning
from tests.tree.vectors import BATCHES, TREES, recut, vector
from treepo_async.config.schema import ESTIMATORS, PATH_WEIGHTS
from treepo_async.tree.advantage import OF_SEGMENTS, advantages, batch_advantages, whiten
from treepo_async.tree.levels import level_tokens, num_levels
from treepo_async.tree.path_weights import leaf_weights

seeds = st.integers(0, 10_000)
are_equal = partial(np.array_equal, equal_nan=True)


def token_by_token(tree, advantages):
    """The advantage of every token of every trajectory, one trajectory after another."""
    rows = []
    for leaf, row in zip(tree.leaves, advantages, strict=True):
        num_tokens = sum(len(tree.segments[i]) for i in tree.path(leaf))
        level = np.arange(num_tokens) // tree.sampling.segment_tokens
        rows.append(row[level] if np.ndim(row) else np.full(num_tokens, row))
    return np.concatenate(rows)


def trees_of(seed, num_trees=2):
    rng = np.random.default_rng(seed)
    return [random_tree(rng, nan_share=0.2) for _ in range(num_trees)]


@pytest.mark.parametrize("estimator", ["treepo", "treepo_size_weighted"])
@pytest.mark.parametrize("name", TREES)
def test_whitening_agrees_with_the_reference_vectors(name, estimator):
    (found,) = batch_advantages([vector(name)], estimator, whitened=True)
    np.testing.assert_allclose(found, TREES[name]["expected"][f"{estimator}_whitened"], atol=1e-6)


@pytest.mark.parametrize("name", BATCHES)
def test_whitening_of_two_prompts_agrees_with_the_reference_vectors(name):
    trees = [vector(tree) for tree in BATCHES[name]["trees"]]
    found = batch_advantages(trees, "treepo", whitened=True)
    for values, expected in zip(found, BATCHES[name]["expected"]["treepo_whitened"], strict=True):
        np.testing.assert_allclose(values, expected, atol=1e-6)
    alone = batch_advantages(trees[:1], "treepo", whitened=True)
    assert not np.allclose(found[0], alone[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_whitening_by_multiplicity_is_whitening_of_replicated_tokens(estimator, seed):
    trees = trees_of(seed)
    raw = [advantages(tree, estimator) for tree in trees]
    tokens = np.concatenate([token_by_token(*pair) for pair in zip(trees, raw, strict=True)])
    tokens = tokens[~np.isnan(tokens)]
    assume(len(tokens) >= 2)
    for found, values in zip(batch_advantages(trees, estimator, whitened=True), raw, strict=True):
        expected = (values - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=15)
@given(seed=seeds, path_weights=st.sampled_from(PATH_WEIGHTS))
def test_cutting_segments_anywhere_leaves_every_whitened_advantage_unchanged(
    estimator, seed, path_weights
):
    rng = np.random.default_rng(seed)
    trees = [with_pruning(tree, rng) for tree in trees_of(seed)]
    finer = [recut(tree, rng) for tree in trees]
    assume(any(len(f.segments) > len(t.segments) for f, t in zip(finer, trees, strict=True)))
    options = {"whitened": True, "path_weights": path_weights}
    found, expected = (batch_advantages(each, estimator, **options) for each in (finer, trees))
    assert all(map(are_equal, found, expected))


@pytest.mark.parametrize(
    ("estimator", "tokens"),
    [("grpo", attrgetter("num_tokens_L")), ("spo", level_tokens)],
    ids=["trajectories", "levels"],
)
@settings(deadline=None, max_examples=25)
@given(seed=seeds)
def test_whitening_counts_the_same_tokens_wherever_segments_are_cut(estimator, tokens, seed):
    trees = trees_of(seed)
    finer = [recut(tree, np.random.default_rng(seed)) for tree in trees]
    found, expected = (
        whiten([advantages(tree, estimator) for tree in each], [tokens(tree) for tree in each])
        for each in (finer, trees)
    )
    assert all(map(are_equal, found, expected))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_weighted_advantages_have_mean_0_over_the_tokens_of_the_batch(estimator):
    rng = np.random.default_rng(5)
    trees = [with_pruning(tree, rng) for tree in trees_of(5, 3)]
    options = {"path_weights": "unbiased"}
    found = batch_advantages(trees, estimator, whitened=True, **options)
    tokens = np.concatenate([token_by_token(*pair) for pair in zip(trees, found, strict=True)])
    assert abs(np.nanmean(tokens)) < 1e-12
    # and before the weights are multiplied in, variance 1 over tokens that count with them
    relative = [leaf_weights(tree, "unbiased") for tree in trees]
    relative = [w / w[~np.isnan(t.rewards_L)].mean() for t, w in zip(trees, relative, strict=True)]
    weights = np.concatenate([token_by_token(*pair) for pair in zip(trees, relative, strict=True)])
    squares, counted = tokens**2 / weights, ~np.isnan(tokens)
    assert squares[counted].sum() / weights[counted].sum() == pytest.approx(1, abs=0.02)


def test_control_weights_multiplied_in_before_whitening_are_another_batch():
    rng = np.random.default_rng(5)
    trees = [with_pruning(tree, rng) for tree in trees_of(5, 3)]
    options = {"path_weights": "unbiased"}
    weighted = [advantages(tree, "treepo", **options) for tree in trees]
    other = whiten(weighted, [tree.num_tokens_L for tree in trees])
    found = batch_advantages(trees, "treepo", whitened=True, **options)
    assert not np.allclose(found[0], other[0], equal_nan=True)


@settings(deadline=None, max_examples=50)
@given(seed=seeds)
def test_values_that_are_constant_along_levels_are_whitened_like_those_of_trajectories(seed):
    trees = trees_of(seed)
    raw = [advantages(tree) for tree in trees]
    wide = [
        np.repeat(values[:, None], num_levels(tree), axis=1)
        for tree, values in zip(trees, raw, strict=True)
    ]
    expected = whiten(raw, [tree.num_tokens_L for tree in trees])
    found = whiten(wide, [level_tokens(tree) for tree in trees])
    for values, rows in zip(expected, found, strict=True):
        np.testing.assert_allclose(rows, np.broadcast_to(values[:, None], rows.shape), atol=1e-9)


def test_control_whitening_with_unit_weights_would_differ():
    tree = vector("C3_ragged_early_stop")
    raw = advantages(tree)
    unit = whiten([raw], [np.ones(len(raw), np.int64)])[0]
    assert not np.allclose(unit, whiten([raw], [tree.num_tokens_L])[0], atol=1e-2)


def test_plain_lists_are_whitened_like_arrays_and_nothing_stays_nothing():
    (found,) = whiten([[1.0, 2.0]], [[3, 4]])
    (expected,) = whiten([np.array([1.0, 2.0])], [np.array([3, 4])])
    np.testing.assert_array_equal(found, expected)
    assert whiten([], []) == []
    assert batch_advantages([], "treepo", whitened=True) == []


@pytest.mark.parametrize("value", [np.nan, 2.0])
def test_whitening_fewer_than_two_tokens_changes_nothing(value):
    found = whiten([np.array([value])], [np.array([1])])
    assert np.array_equal(found[0], [value], equal_nan=True)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_whitening_a_batch_has_its_raw_advantages(estimator):
    rng = np.random.default_rng(2)
    tree = with_pruning(random_tree(rng, num_segments=20), rng)
    options = {"path_weights": "unbiased"}
    (found,) = batch_advantages([tree], estimator, whitened=False, **options)
    assert np.array_equal(found, advantages(tree, estimator, **options), equal_nan=True)


def test_a_batch_can_leave_one_out():
    tree = vector("C3_ragged_early_stop")
    (found,) = batch_advantages([tree], "grpo", whitened=False, leave_one_out=True)
    assert np.array_equal(found, advantages(tree, "grpo", leave_one_out=True))


@pytest.mark.parametrize("estimator", OF_SEGMENTS)
def test_a_batch_without_a_scored_leaf_has_no_advantages(estimator):
    tree = vector("C3_ragged_early_stop")
    tree = replace(tree, rewards_L=np.full(4, np.nan, np.float32))
    (found,) = batch_advantages([tree], estimator, whitened=True)
    assert np.isnan(found).all()
