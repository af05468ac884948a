from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.learner.packing.cost import load_of
from treepo_async.learner.packing.split import best_cuts, row_of, split


def trees():
    return st.builds(
        lambda seed, size: random_tree(np.random.default_rng(seed), num_segments=size),
        st.integers(0, 10_000),
        st.integers(1, 24),
    )


def recomputed(tree, pieces):
    """Tokens of the pieces beyond those of all their leaves together."""
    together = load_of(tree, [leaf for piece in pieces for leaf in piece]).tokens
    return sum(load_of(tree, piece).tokens for piece in pieces) - together


def all_cuts(leaves):
    """Every way to cut a row into consecutive pieces."""
    for bits in product((False, True), repeat=len(leaves) - 1):
        bounds = [0, *(i for i, bit in enumerate(bits, start=1) if bit), len(leaves)]
        yield [leaves[start:stop] for start, stop in pairwise(bounds)]


@given(tree=trees(), budget=st.integers(1, 200), data=st.data())
@settings(max_examples=100, deadline=None)
def test_each_leaf_is_in_one_piece_and_every_piece_fits_or_is_one_trajectory(tree, budget, data):
    leaves = data.draw(
        st.lists(st.sampled_from(range(len(tree.leaves))), min_size=1, unique=True), "leaves"
    )
    pieces = split(row_of(tree, leaves), budget)
    assert sorted(leaf for piece in pieces for leaf in piece) == sorted(leaves)
    for piece in pieces:
        assert len(piece) == 1 or load_of(tree, piece).tokens <= budget


@given(tree=trees(), budget=st.integers(1, 120), data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_other_cut_into_consecutive_leaves_computes_fewer_tokens_twice(tree, budget, data):
    chosen = data.draw(
        st.lists(st.sampled_from(range(len(tree.leaves))), min_size=1, max_size=9, unique=True),
        "leaves",
    )
    row = row_of(tree, chosen)
    fitting = [
        recomputed(tree, pieces)
        for pieces in all_cuts(row.leaves)
        if all(len(piece) == 1 or load_of(tree, piece).tokens <= budget for piece in pieces)
    ]
    assert recomputed(tree, split(row, budget)) == min(fitting)


@given(tree=trees())
@settings(max_examples=30, deadline=None)
def test_a_row_holds_what_each_leaf_shares_with_the_one_before_it(tree):
    row = row_of(tree, range(len(tree.leaves)))
    own = [load_of(tree, [leaf]).tokens for leaf in row.leaves]
    assert list(row.lengths) == own
    for (before, leaf), shared in zip(pairwise(row.leaves), row.shared[1:], strict=True):
        alone = load_of(tree, [before]).tokens + load_of(tree, [leaf]).tokens
        assert shared == alone - load_of(tree, [before, leaf]).tokens
    assert row.shared[0] == 0


def test_a_tree_within_the_budget_stays_whole_and_one_token_less_cuts_it():
    tree = random_tree(np.random.default_rng(3), num_segments=20)
    row = row_of(tree, range(len(tree.leaves)))
    size = load_of(tree, row.leaves).tokens
    assert split(row, size) == [row.leaves]
    assert len(split(row, size - 1)) == 2


def test_the_cut_is_where_the_least_is_shared():
    lengths, shared = [10, 10, 10, 10], [0, 9, 8, 1]
    assert best_cuts(lengths, shared, 13) == [0, 3]
    assert best_cuts(lengths, shared, 12) == [0, 2, 3], "1 + 8 tokens again, not 1 + 9"


def test_of_equally_cheap_cuts_the_fewest_are_made():
    assert best_cuts([4, 4, 4, 4], [0, 0, 0, 0], 8) == [0, 2]


@pytest.mark.parametrize("budget", [1, 9, 10])
def test_a_trajectory_above_the_budget_makes_a_piece_of_its_own(budget):
    assert best_cuts([10, 30, 10], [0, 5, 5], budget) == [0, 1, 2]
