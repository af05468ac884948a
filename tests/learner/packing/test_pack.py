"""Packing against the definition of a path, on random trees."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree, token_sums, visible_by_ancestors
from treepo_async.errors import TreeError
from treepo_async.learner.packing.pack import edge_values, empty_batch, pack, pack_sequences
from treepo_async.learner.packing.piece import Piece, counted_leaves
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


def pieces_of(advantages):
    """All counted trajectories of each tree together."""
    pieces = [Piece(i, counted_leaves(values)) for i, values in enumerate(advantages)]
    return [piece for piece in pieces if piece.leaves]


def ones(trees):
    return [np.ones(len(tree.leaves)) for tree in trees]


def lay_out(trees, advantages, weights=None, pieces=None, align=1):
    """One microbatch."""
    chosen = pieces_of(advantages) if pieces is None else pieces
    (batch,) = pack(trees, advantages, weights or ones(trees), [chosen], align)
    return batch


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
    trees, advantages = forest(seed, nan_share=0.0)
    batch = lay_out(trees, advantages, align=8)
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
    batch = lay_out(*forest(seed))
    mask = mask_of(batch)
    np.testing.assert_array_equal(batch.position_ids, mask.sum(axis=1) - 1)
    for prev, target in zip(batch.prev, batch.target, strict=True):
        assert prev == np.flatnonzero(mask[target, :target]).max()


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_every_trained_token_carries_its_sums_over_the_counted_leaves_below(seed):
    trees, advantages = forest(seed, nan_share=0.4)
    batch = lay_out(trees, advantages)
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
    batch = lay_out(trees, advantages)
    check_sums(batch, trees, advantages)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_advantages_that_are_constant_along_levels_are_exactly_those_of_trajectories(seed):
    trees, advantages = forest(seed, nan_share=0.4)
    wide = [
        np.repeat(values[:, None], num_levels(tree), axis=1)
        for tree, values in zip(trees, advantages, strict=True)
    ]
    one, other = (lay_out(trees, values) for values in (advantages, wide))
    for name in ("positive", "negative", "count", "target", "prev", "input_ids"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_control_levels_that_are_swapped_are_other_sums():
    rng = np.random.default_rng(5)
    tree = random_tree(rng, num_segments=14)
    values = rng.normal(size=(len(tree.leaves), num_levels(tree)))
    one, other = (lay_out([tree], [v]) for v in (values, values[:, ::-1]))
    assert not np.allclose(one.positive, other.positive)


def test_what_stands_behind_the_end_of_a_leaf_is_not_read():
    rng = np.random.default_rng(5)
    tree = random_tree(rng, num_segments=14, nan_share=0.3)
    values = by_level(tree, rng)
    filled = np.where(np.isnan(values[:, :1]) | ~np.isnan(values), values, 99.0)
    assert (filled == 99).any()
    one, other = (lay_out([tree], [v]) for v in (values, filled))
    np.testing.assert_array_equal(one.positive, other.positive)
    np.testing.assert_array_equal(one.negative, other.negative)


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_trajectory_tokens_are_counted_once_per_counted_leaf(seed):
    trees, advantages = forest(seed, nan_share=0.4)
    batch = lay_out(trees, advantages)
    assert batch.count.sum() == sum(
        len(tree.segments[i])
        for tree, advantages_L in zip(trees, advantages, strict=True)
        for leaf, advantage in zip(tree.leaves, advantages_L, strict=True)
        if not np.isnan(advantage)
        for i in tree.path(leaf)
    )


@given(SEEDS, st.integers(2, 5))
@settings(max_examples=60, deadline=None)
def test_the_sums_of_pieces_add_up_to_those_of_the_tree(seed, num_pieces):
    rng = np.random.default_rng(seed)
    trees, advantages = forest(seed)
    weights = [rng.random(len(tree.leaves)) for tree in trees]
    cut = [
        Piece(whole.tree, tuple(leaves))
        for whole in pieces_of(advantages)
        for leaves in np.array_split(whole.leaves, num_pieces)
        if len(leaves)
    ]
    one, other = (
        token_rows(lay_out(trees, advantages, weights, pieces))
        for pieces in (pieces_of(advantages), cut)
    )
    assert one.keys() == other.keys()
    for token, rows in one.items():
        np.testing.assert_allclose(sum(other[token]), sum(rows), rtol=1e-12, atol=1e-15)


def token_rows(batch):
    """(P, N, W, count) of every token, once for each piece it is in."""
    rows = {}
    for t, s, edges in batch.segments():
        columns = batch.positive, batch.negative, batch.weight, batch.count
        for place, row in enumerate(zip(*(c[edges] for c in columns), strict=True)):
            rows.setdefault((t, s, place), []).append(np.array(row))
    return rows


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_paths_lead_from_the_prompt_to_each_leaf_and_carry_its_terms(seed):
    rng = np.random.default_rng(seed)
    trees, _ = forest(seed)
    advantages = [by_level(tree, rng) for tree in trees]
    weights = [rng.random((len(tree.leaves), num_levels(tree))) for tree in trees]
    pieces = [Piece(p.tree, (leaf,)) for p in pieces_of(advantages) for leaf in p.leaves]
    pieces += pieces_of(advantages)
    batch = lay_out(trees, advantages, weights, pieces)
    expected = [(piece.tree, leaf) for piece in pieces for leaf in piece.leaves]
    assert batch.num_trajectories == len(expected)
    for j, (t, leaf) in enumerate(expected):
        slots = batch.path_slot[batch.path_trajectory == j]
        path = trees[t].path(trees[t].leaves[leaf])
        assert set(batch.slot_tree[slots]) == {t}
        assert batch.slot_segment[slots].tolist() == list(path)
        assert batch.slot_parent[slots].tolist() == [ROOT, *slots[:-1]]
        a, w = advantages[t][leaf], weights[t][leaf]
        levels = [trees[t].segments[i].level for i in path]
        mine = batch.path_trajectory == j
        np.testing.assert_allclose(batch.path_positive[mine], (w * np.maximum(a, 0))[levels])
        np.testing.assert_allclose(batch.path_negative[mine], (w * np.maximum(-a, 0))[levels])


def test_a_weight_multiplies_the_sums_of_its_trajectory():
    tree = random_tree(np.random.default_rng(3))
    advantages, weights = [np.ones(len(tree.leaves))], [np.zeros(len(tree.leaves))]
    weights[0][1] = 0.25
    batch = lay_out([tree], advantages, weights)
    path = tree.path(tree.leaves[1])
    on_path = np.isin(batch.slot_segment[batch.slot], path)
    np.testing.assert_array_equal(batch.positive, np.where(on_path, 0.25, 0.0))
    np.testing.assert_array_equal(batch.weight, batch.positive)
    assert batch.count.sum() == tree.num_delivered_tokens


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_the_order_of_siblings_changes_no_token_of_the_loss(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng)
    advantages_L = rng.normal(size=len(tree.leaves))
    shuffled, mirrored_L = mirror(tree, advantages_L)
    before = lay_out([tree], [advantages_L])
    after = lay_out([shuffled], [mirrored_L])

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


def test_tokens_below_no_counted_leaf_are_not_computed():
    rng = np.random.default_rng(3)
    tree = random_tree(rng)
    values = rng.normal(size=len(tree.leaves))
    values[1:] = np.nan
    batch = lay_out([tree], [values])
    path = tree.path(tree.leaves[0])
    expected = [tree.prompt.token_ids, *(tree.segments[i].token_ids for i in path)]
    assert batch.input_ids.tolist() == np.concatenate(expected).tolist()
    assert batch.position_ids.tolist() == list(range(batch.num_tokens))


def test_a_piece_with_a_leaf_that_does_not_count_is_refused():
    tree = random_tree(np.random.default_rng(3))
    values = np.full(len(tree.leaves), np.nan)
    with pytest.raises(TreeError, match="a piece of tree 0 has a leaf whose advantage is NaN"):
        lay_out([tree], [values], pieces=[Piece(0, (0,))])


def test_a_microbatch_without_pieces_is_padding():
    (batch,) = pack([], [], [], [[]], align=4)
    assert (batch.num_tokens, batch.num_trained_tokens) == (4, 0)
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
    assert batch.slot_tree[batch.slot].tolist() == [0, 0, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]


def test_values_of_segments_land_on_their_tokens():
    trees, advantages = forest(11)
    batch = lay_out(trees, advantages)
    values = [[s.behavior_logprobs for s in tree.segments] for tree in trees]
    np.testing.assert_array_equal(edge_values(batch, values), batch.behavior_logprobs)
    values[0][int(batch.slot_segment[0])] = np.zeros(99, np.float32)
    with pytest.raises(TreeError, match="99 values"):
        edge_values(batch, values)


def test_a_tree_without_one_advantage_per_leaf_is_refused():
    tree = random_tree(np.random.default_rng(0))
    with pytest.raises(TreeError, match=r"advantages\[0\] has shape \[1\], the tree has"):
        lay_out([tree], [np.zeros(1)])


@pytest.mark.parametrize(("leaves", "levels"), [(0, 1), (0, -1), (1, 0)])
def test_a_tree_without_one_advantage_per_leaf_and_level_is_refused(leaves, levels):
    tree = random_tree(np.random.default_rng(0))
    shape = len(tree.leaves) + leaves, num_levels(tree) + levels
    with pytest.raises(TreeError, match=rf"advantages\[1\] has shape \[{shape[0]}, {shape[1]}\]"):
        lay_out([tree, tree], [np.zeros(len(tree.leaves)), np.zeros(shape)])


def test_a_leaf_that_counts_at_some_of_its_levels_alone_is_refused():
    tree = random_tree(np.random.default_rng(0), num_segments=20)
    values = np.zeros((len(tree.leaves), num_levels(tree)))
    leaf = next(i for i, s in enumerate(tree.leaves) if tree.segments[s].level > 0)
    values[leaf, 1] = np.nan
    with pytest.raises(TreeError, match=rf"is nan for leaf {leaf} at level 1 and 0.0 at level 0"):
        lay_out([tree], [values])


def test_an_empty_sequence_is_refused():
    with pytest.raises(TreeError, match=r"sequences\[0\] is empty"):
        pack_sequences([np.zeros(0, np.int32)], 100)
