"""Packing against the definition of a path, on random trees."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree, token_sums, visible_by_ancestors
from treepo_async.errors import TreeError
from treepo_async.learner.pack import edge_values, empty_batch, pack, pack_sequences
from treepo_async.tree.advantage import OF_SEGMENTS, batch_advantages
from treepo_async.tree.levels import num_levels
from treepo_async.types import ROOT

SEEDS = st.integers(0, 2**32 - 1)


def forest(seed, *, num_trees=3, nan_share=0.2):
    rng = np.random.default_rng(seed)
    trees = [
        random_tree(rng, num_segments=int(rng.integers(1, 14)), nan_share=nan_share)
        for _ in range(num_trees)
    ]
    advantages = [
        np.where(np.isnan(tree.rewards_L), np.nan, rng.normal(size=len(tree.leaves)))
        for tree in trees
    ]
    return trees, advantages


def mask_of(batch):
    index = np.arange(batch.num_tokens)
    return (index[None] <= index[:, None]) & (index[:, None] < batch.end[None])


def by_level(tree, rng):
    """One number per leaf and level, NaN for the leaf's unscored and behind its end as an estimator gives it."""
    level_L1 = np.array([[tree.segments[leaf].level] for leaf in tree.leaves])
    values = rng.normal(size=(len(tree.leaves), num_levels(tree)))
    values[np.arange(values.shape[1]) > level_L1] = np.nan
    values[np.isnan(tree.rewards_L)] = np.nan
    return values


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_a_token_sees_exactly_its_path_and_never_another_tree_or_the_padding(seed):
    trees, advantages = forest(seed)
    (batch,) = pack(trees, advantages, budget_tokens=10**6, align=8)
    expected = np.eye(batch.num_tokens, dtype=bool)
    start = 0
    for tree in trees:
        alone = visible_by_ancestors(tree)
        expected[start : start + len(alone), start : start + len(alone)] = alone
        start += len(alone)
    assert batch.num_tokens % 8 == 0
    np.testing.assert_array_equal(mask_of(batch), expected)


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_positions_and_predecessors_follow_the_path(seed):
    (batch,) = pack(*forest(seed), budget_tokens=10**6)
    mask = mask_of(batch)
    np.testing.assert_array_equal(batch.position_ids, mask.sum(axis=1) - 1)
    for prev, target in zip(batch.prev, batch.target, strict=True):
        assert prev == np.flatnonzero(mask[target, :target]).max()


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_every_trained_token_carries_its_sums_over_the_counted_leaves_below(seed):
    trees, advantages = forest(seed, nan_share=0.4)
    (batch,) = pack(trees, advantages, budget_tokens=10**6)
    check_sums(batch, trees, advantages)
    for t, s, edges in batch.segments():
        segment = trees[t].segments[s]
        np.testing.assert_array_equal(batch.input_ids[batch.target[edges]], segment.token_ids)
        np.testing.assert_array_equal(batch.behavior_logprobs[edges], segment.behavior_logprobs)
        np.testing.assert_array_equal(batch.policy_step[edges], segment.policy_version.step)
        np.testing.assert_array_equal(batch.lineage[edges], segment.policy_version.lineage)
        np.testing.assert_array_equal(batch.mixed_context[edges], segment.mixed_context)
        np.testing.assert_array_equal(batch.level[edges], segment.level)


def check_sums(batch, trees, advantages):
    """P, N and W of every trained token are those of the slow loop, and the tokens are those it trains."""
    expected = [token_sums(*pair) for pair in zip(trees, advantages, strict=True)]
    found = {}
    for t, s, edges in batch.segments():
        rows = zip(batch.positive[edges], batch.negative[edges], batch.count[edges], strict=True)
        found |= {(t, s, place): row for place, row in enumerate(rows)}
    assert found.keys() == {(t, *token) for t, sums in enumerate(expected) for token in sums}
    for (t, *token), row in found.items():
        np.testing.assert_allclose(row, expected[t][tuple(token)], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("estimator", OF_SEGMENTS)
@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_token_carries_the_sums_of_its_own_level(estimator, seed):
    trees, _ = forest(seed, nan_share=0.4)
    advantages = batch_advantages(trees, estimator, whitened=True, path_weights="unbiased")
    (batch,) = pack(trees, advantages, budget_tokens=10**6)
    check_sums(batch, trees, advantages)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_advantages_that_are_constant_along_levels_are_exactly_those_of_trajectories(seed):
    trees, advantages = forest(seed, nan_share=0.4)
    wide = [
        np.repeat(values[:, None], num_levels(tree), axis=1)
        for tree, values in zip(trees, advantages, strict=True)
    ]
    (one,), (other,) = (pack(trees, values, budget_tokens=10**6) for values in (advantages, wide))
    for name in ("positive", "negative", "count", "target", "prev", "input_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_control_levels_that_are_swapped_are_other_sums():
    rng = np.random.default_rng(5)
    tree = random_tree(rng, num_segments=14)
    values = rng.normal(size=(len(tree.leaves), num_levels(tree)))
    (one,), (other,) = (pack([tree], [v], 10**6) for v in (values, values[:, ::-1]))
    assert not np.allclose(one.positive, other.positive)


def test_what_stands_behind_the_end_of_a_leaf_is_not_read():
    rng = np.random.default_rng(5)
    tree = random_tree(rng, num_segments=14, nan_share=0.3)
    values = by_level(tree, rng)
    filled = np.where(np.isnan(values[:, :1]) | ~np.isnan(values), values, 99.0)
    assert (filled == 99).any()
    (one,), (other,) = (pack([tree], [v], 10**6) for v in (values, filled))
    np.testing.assert_array_equal(one.positive, other.positive)
    np.testing.assert_array_equal(one.negative, other.negative)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_trajectory_tokens_are_counted_once_per_counted_leaf(seed):
    trees, advantages = forest(seed, nan_share=0.4)
    (batch,) = pack(trees, advantages, budget_tokens=10**6)
    assert batch.num_trajectory_tokens == sum(
        len(tree.segments[i])
        for tree, advantages_L in zip(trees, advantages, strict=True)
        for leaf, advantage in zip(tree.leaves, advantages_L, strict=True)
        if not np.isnan(advantage)
        for i in tree.path(leaf)
    )


@given(SEEDS, st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_microbatches_keep_the_order_of_whole_trees_and_the_budget(seed, budget):
    trees, advantages = forest(seed, num_trees=6)
    sizes = [len(tree.prompt.token_ids) + tree.num_tokens for tree in trees]
    batches = pack(trees, advantages, budget)
    alone = [pack([tree], [a], 1)[0] for tree, a in zip(trees, advantages, strict=True)]
    np.testing.assert_array_equal(
        np.concatenate([batch.input_ids for batch in batches]),
        np.concatenate([batch.input_ids for batch in alone]),
    )
    np.testing.assert_array_equal(
        np.concatenate([batch.positive for batch in batches]),
        np.concatenate([batch.positive for batch in alone]),
    )
    largest = max(sizes)
    assert all(batch.num_tokens <= max(budget, largest) for batch in batches)
    for batch in batches:
        assert batch.num_tokens <= budget or batch.num_tokens in sizes


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_order_of_siblings_changes_no_token_of_the_loss(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng)
    advantages_L = rng.normal(size=len(tree.leaves))
    shuffled, mirrored_L = mirror(tree, advantages_L)
    (before,) = pack([tree], [advantages_L], 10**6)
    (after,) = pack([shuffled], [mirrored_L], 10**6)

    def rows(batch):
        tokens = batch.input_ids[batch.target], batch.input_ids[batch.prev]
        depth = batch.position_ids[batch.target]
        sums = batch.positive, batch.negative, batch.count, batch.behavior_logprobs
        return sorted(
            (tuple(map(float, row)) for row in zip(*tokens, depth, *sums, strict=True)),
            key=lambda row: tuple(round(value, 4) for value in row),
        )

    np.testing.assert_allclose(rows(before), rows(after), rtol=1e-5, atol=1e-6)


def mirror(tree, advantages_L):
    """The same tree with every set of siblings created in the opposite order."""
    levels = [ROOT]
    order = []
    while levels:
        parent = levels.pop(0)
        children = [i for i, s in enumerate(tree.segments) if s.parent == parent][::-1]
        order.extend(children)
        levels.extend(children)
    place = {old: new for new, old in enumerate(order)} | {ROOT: ROOT}
    segments = tuple(
        replace(tree.segments[i], parent=place[tree.segments[i].parent]) for i in order
    )
    by_segment = dict(zip(tree.leaves, range(len(tree.leaves)), strict=True))
    leaves = [by_segment[i] for i in order if i in by_segment]
    mirrored = replace(
        tree,
        segments=segments,
        rewards_L=tree.rewards_L[leaves],
        accuracies_L=tree.accuracies_L[leaves],
    )
    mirrored.check()
    return mirrored, advantages_L[leaves]


def test_tokens_below_no_counted_leaf_are_context_only():
    tree = random_tree(np.random.default_rng(3))
    (batch,) = pack([tree], [np.full(len(tree.leaves), np.nan)], 100)
    assert batch.num_trained_tokens == 0
    assert batch.num_trajectory_tokens == 0
    assert batch.num_tokens == len(tree.prompt.token_ids) + tree.num_tokens
    assert list(batch.segments()) == []


def test_padding_alone_trains_nothing():
    batch = empty_batch(align=4)
    assert (batch.num_tokens, batch.num_trained_tokens) == (4, 0)
    np.testing.assert_array_equal(mask_of(batch), np.eye(4, dtype=bool))


def test_a_sequence_is_a_tree_of_one_path():
    sequences = [np.array([5, 6, 7], np.int32), np.array([8], np.int32), np.array([9, 1], np.int32)]
    (batch,) = pack_sequences(sequences, 100)
    assert batch.input_ids[batch.target].tolist() == [6, 7, 1]
    assert batch.input_ids[batch.prev].tolist() == [5, 6, 9]
    assert batch.tree_index.tolist() == [0, 0, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]


def test_values_of_segments_land_on_their_tokens():
    trees, advantages = forest(11)
    (batch,) = pack(trees, advantages, 10**6)
    values = [[s.behavior_logprobs for s in tree.segments] for tree in trees]
    np.testing.assert_array_equal(edge_values(batch, values), batch.behavior_logprobs)
    values[0][int(batch.segment_index[0])] = np.zeros(99, np.float32)
    with pytest.raises(TreeError, match="99 values"):
        edge_values(batch, values)


def test_a_tree_without_one_advantage_per_leaf_is_refused():
    tree = random_tree(np.random.default_rng(0))
    with pytest.raises(TreeError, match=r"advantages\[0\] has shape \[1\], the tree has"):
        pack([tree], [np.zeros(1)], 100)


@pytest.mark.parametrize(("leaves", "levels"), [(0, 1), (0, -1), (1, 0)])
def test_a_tree_without_one_advantage_per_leaf_and_level_is_refused(leaves, levels):
    tree = random_tree(np.random.default_rng(0))
    shape = len(tree.leaves) + leaves, num_levels(tree) + levels
    with pytest.raises(TreeError, match=rf"advantages\[1\] has shape \[{shape[0]}, {shape[1]}\]"):
        pack([tree, tree], [np.zeros(len(tree.leaves)), np.zeros(shape)], 100)


def test_a_leaf_that_counts_at_some_of_its_levels_alone_is_refused():
    tree = random_tree(np.random.default_rng(0), num_segments=20)
    values = np.zeros((len(tree.leaves), num_levels(tree)))
    leaf = next(i for i, s in enumerate(tree.leaves) if tree.segments[s].level > 0)
    values[leaf, 1] = np.nan
    with pytest.raises(TreeError, match=rf"is nan for leaf {leaf} at level 1 and 0.0 at level 0"):
        pack([tree], [values], 100)


def test_an_empty_sequence_is_refused():
    with pytest.raises(TreeError, match=r"sequences\[0\] is empty"):
        pack_sequences([np.zeros(0, np.int32)], 100)
