from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.learner.shares import batch_of
from tests.oracle import random_tree
from treepo_async.bench.learner_cells import parse
from treepo_async.bench.learner_trees import trees_of
from treepo_async.errors import ConfigError
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.cost import CostModel, load_of
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.piece import Piece, counted_leaves


def batch(num_trees, seed=0, nan_share=0.2, num_segments=12):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, num_segments=num_segments) for _ in range(num_trees)]
    advantages = [rng.normal(size=len(tree.leaves)) for tree in trees]
    for values in advantages:
        values[rng.random(len(values)) < nan_share] = np.nan
    return batch_of(trees, advantages)


def pieces_of(share):
    return [piece for pieces in share.microbatches for piece in pieces]


def tokens_of(share, pieces):
    return sum(load_of(share.trees[piece.tree], piece.leaves).tokens for piece in pieces)


@given(
    num_trees=st.integers(0, 7),
    num_replicas=st.integers(1, 4),
    num_stages=st.integers(1, 3),
    budget_tokens=st.integers(1, 400),
    packing=st.sampled_from(["auto", "tree", "flat"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=120, deadline=None)
def test_every_counted_trajectory_is_trained_once_and_all_replicas_have_equally_many_microbatches(
    num_trees, num_replicas, num_stages, budget_tokens, packing, seed
):
    whole = batch(num_trees, seed)
    shares = divide(
        whole,
        num_replicas=num_replicas,
        num_stages=num_stages,
        budget_tokens=budget_tokens,
        packing=packing,
    )
    assert len(shares) == num_replicas
    assert len({len(share.microbatches) for share in shares}) == 1
    assert len(shares[0].microbatches) >= 1, "a schedule cannot run without a microbatch"
    found = []
    for share in shares:
        for pieces in share.microbatches:
            alone = len(pieces) == 1 and len(pieces[0].leaves) == 1
            assert alone or tokens_of(share, pieces) <= budget_tokens
        found += [
            (id(share.trees[piece.tree]), leaf)
            for piece in pieces_of(share)
            for leaf in piece.leaves
        ]
    assert sorted(found) == sorted(
        (id(tree), leaf)
        for tree, values in zip(whole.trees, whole.advantages, strict=True)
        for leaf in counted_leaves(values)
    )


@given(num_replicas=st.integers(1, 4), budget_tokens=st.integers(20, 100), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_a_share_has_the_trees_of_its_pieces_with_all_that_is_known_of_them(
    num_replicas, budget_tokens, seed
):
    plain = batch(5, seed)
    known = [
        [np.full(len(s), t, np.float32) for s in tree.segments]
        for t, tree in enumerate(plain.trees)
    ]
    bounds = Bounds(log_ratio_std=0.5)
    whole = batch_of(
        plain.trees,
        plain.advantages,
        proximal=known,
        reference=[[values + 100 for values in tree] for tree in known],
    )
    whole = replace(whole, bounds=bounds)
    place = {id(tree): i for i, tree in enumerate(whole.trees)}
    for share in divide(whole, num_replicas=num_replicas, budget_tokens=budget_tokens):
        assert {piece.tree for piece in pieces_of(share)} == set(range(len(share.trees)))
        assert share.bounds is bounds
        assert len(share.proximal) == len(share.reference) == len(share.trees)
        for i, tree in enumerate(share.trees):
            t = place[id(tree)]
            assert share.advantages[i] is whole.advantages[t]
            assert share.weights[i] is whole.weights[t]
            assert share.proximal[i][0][0] == t
            assert share.reference[i][0][0] == 100 + t


def test_the_same_batch_is_always_divided_the_same_way():
    whole = batch(6)
    first, second = (divide(whole, num_replicas=3, budget_tokens=60) for _ in range(2))
    assert [share.microbatches for share in first] == [share.microbatches for share in second]


def test_flat_packing_is_one_piece_a_trajectory_and_tree_packing_one_a_tree():
    whole = batch(4, nan_share=0.0)
    (tree,) = divide(whole, num_replicas=1, budget_tokens=10**6, packing="tree")
    assert [len(piece.leaves) for piece in pieces_of(tree)] == [len(t.leaves) for t in whole.trees]
    (flat,) = divide(whole, num_replicas=1, budget_tokens=10**6, packing="flat")
    assert {len(piece.leaves) for piece in pieces_of(flat)} == {1}
    assert len(pieces_of(flat)) == sum(len(t.leaves) for t in whole.trees)


def test_auto_takes_for_each_tree_what_costs_less():
    whole = batch(4, nan_share=0.0)

    def packed(cost):
        (share,) = divide(whole, num_replicas=1, budget_tokens=10**6, packing="auto", cost=cost)
        return [len(piece.leaves) for piece in pieces_of(share)]

    leaves = [len(tree.leaves) for tree in whole.trees]
    assert packed(CostModel()) == leaves
    assert packed(CostModel(per_token=1.0, per_node=1000.0)) == [1] * sum(leaves)
    # flat packing of a tree computes `repeated` tokens more and `forks` nodes less
    margins = []
    for tree in whole.trees:
        together = load_of(tree, range(len(tree.leaves)))
        alone = [load_of(tree, [leaf]) for leaf in range(len(tree.leaves))]
        repeated = sum(load.tokens for load in alone) - together.tokens
        margins.append(repeated / (together.nodes - len(alone)))
    threshold = float(np.median(margins))
    mixed = packed(CostModel(per_token=1.0, per_node=threshold))
    assert 1 in mixed
    assert max(mixed) > 1


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_tree_packing_is_kept_to_where_flat_packing_would_cost_less(num_replicas):
    whole, sizes = batch(4, nan_share=0.0), {"num_replicas": num_replicas, "budget_tokens": 10**6}
    costly = CostModel(per_token=1.0, per_node=1000.0)
    found = divide(whole, **sizes, cost=costly)
    expected = divide(whole, **sizes, cost=CostModel())
    assert [share.microbatches for share in found] == [share.microbatches for share in expected]
    assert any(len(piece.leaves) > 1 for share in found for piece in pieces_of(share))


def test_a_tree_that_one_replica_would_have_to_itself_is_shared_out():
    whole = batch(1, nan_share=0.0, num_segments=40)
    shares = divide(whole, num_replicas=2, budget_tokens=10**6)
    sizes = [tokens_of(share, pieces_of(share)) for share in shares]
    together = load_of(whole.trees[0], range(len(whole.trees[0].leaves))).tokens
    assert min(sizes) > 0
    assert max(sizes) < 0.75 * together


def test_a_tree_that_cannot_be_cut_leaves_the_other_replica_an_empty_microbatch():
    whole = batch(1, nan_share=0.0, num_segments=1)
    first, second = divide(whole, num_replicas=2, budget_tokens=10**6)
    assert (len(first.trees), first.microbatches) == (1, ((Piece(0, (0,)),),))
    assert (len(second.trees), second.microbatches) == (0, ((),))


def test_a_pipeline_gets_as_many_microbatches_as_it_has_stages():
    whole = batch(6)
    (share,) = divide(whole, num_replicas=1, num_stages=4, budget_tokens=10**6)
    assert len(share.microbatches) >= 4
    assert all(share.microbatches)


def test_pieces_of_a_tree_that_meet_in_a_microbatch_are_one():
    whole = batch(3, nan_share=0.0, num_segments=40)
    for num_replicas in (1, 2, 4):
        for share in divide(whole, num_replicas=num_replicas, budget_tokens=10**6):
            for pieces in share.microbatches:
                assert len({piece.tree for piece in pieces}) == len(pieces)


def test_another_packing_is_refused():
    with pytest.raises(ConfigError, match=r"learner\.packing='best' is unknown; it is one of auto"):
        divide(batch(1), num_replicas=1, budget_tokens=10, packing="best")


def test_with_a_budget_of_four_paths_little_is_computed_twice_and_replicas_cost_the_same():
    (cell,) = parse(["branching=treepo", "width=16", "segment=16", "prompt=8", "prompts=40"]).cells
    trees = trees_of(cell, 100)
    whole = batch_of(trees, [np.zeros(len(tree.leaves)) for tree in trees])
    cost = CostModel(per_token=100.0, per_pair=1.0)
    unique = sum(load_of(tree, range(len(tree.leaves))).tokens for tree in trees)
    shares = divide(whole, num_replicas=4, num_stages=2, budget_tokens=4 * (8 + 7 * 16), cost=cost)
    assert sum(tokens_of(share, pieces_of(share)) for share in shares) < 1.06 * unique
    costs = [
        sum(cost.cost(load_of(share.trees[p.tree], p.leaves)) for p in pieces_of(share))
        for share in shares
    ]
    assert max(costs) < 1.01 * sum(costs) / 4
    assert sum(len(share.trees) for share in shares) <= 44, "few trees go to two replicas"
