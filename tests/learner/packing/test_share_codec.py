"""A share on its way to another rank."""

from dataclasses import replace

import numpy as np
import pytest

from tests.learner.shares import batch_of, share_of
from tests.oracle import random_tree
from treepo_async.errors import TreeError
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.share_codec import (
    share_from_bytes,
    share_to_bytes,
    values_from_bytes,
    values_to_bytes,
)
from treepo_async.tree.advantage import batch_advantages


def batch(num_trees, seed=0):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng) for _ in range(num_trees)]
    return trees, [rng.normal(size=len(tree.leaves)) for tree in trees]


def behavior(trees):
    return [tuple(s.behavior_logprobs for s in tree.segments) for tree in trees]


@pytest.mark.parametrize("known", [(), ("proximal",), ("reference",), ("proximal", "reference")])
def test_bytes_carry_a_share_exactly(known):
    trees, advantages = batch(5)
    advantages[1][0] = np.nan
    share = share_of(trees, advantages, budget_tokens=150, **dict.fromkeys(known, behavior(trees)))
    share = replace(share, bounds=Bounds(0.25, 3.0))
    assert len(share.microbatches) > 1
    found = share_from_bytes(share_to_bytes(share))
    assert found.microbatches == share.microbatches
    assert found.bounds == share.bounds
    assert share_to_bytes(found) == share_to_bytes(share)
    for name in ("advantages", "weights"):
        for a, b in zip(getattr(found, name), getattr(share, name), strict=True):
            np.testing.assert_array_equal(a, b)
    for name in ("proximal", "reference"):
        assert (getattr(found, name) is None) == (name not in known)
        for a, b in zip(getattr(found, name) or (), getattr(share, name) or (), strict=True):
            np.testing.assert_equal(a, b)
    for a, b in zip(found.trees, share.trees, strict=True):
        assert a.prompt.id == b.prompt.id
        assert [s.token_ids.tolist() for s in a.segments] == [
            s.token_ids.tolist() for s in b.segments
        ]


def test_bounds_that_mask_nothing_travel_too():
    trees, advantages = batch(1)
    found = share_from_bytes(share_to_bytes(share_of(trees, advantages))).bounds
    assert np.isnan(found.log_ratio_std)
    assert found.largest_square == np.inf


def test_bytes_carry_advantages_of_levels_with_their_shape():
    trees, _ = batch(3)
    advantages = batch_advantages(trees, "spo", whitened=True)
    assert len({a.shape for a in advantages}) > 1
    share = share_of(trees, advantages)
    found = share_from_bytes(share_to_bytes(share)).advantages
    for values, expected in zip(found, share.advantages, strict=True):
        np.testing.assert_array_equal(values, expected)


def test_values_of_tokens_come_back_for_each_segment():
    (tree,), _ = batch(1)
    (values,) = behavior([tree])
    found = values_from_bytes(tree, values_to_bytes(values))
    np.testing.assert_equal(found, values)


def test_a_tree_without_advantages_is_refused():
    trees, advantages = batch(2)
    with pytest.raises(TreeError, match="2 trees have 1 rows of advantages"):
        replace(batch_of(trees, advantages), advantages=tuple(advantages[:1]))
