import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.errors import TreeError
from treepo_async.learner.pack import num_packed_tokens
from treepo_async.learner.share import Share, divide
from treepo_async.tree.advantage import batch_advantages


def batch(num_trees, seed=0):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng) for _ in range(num_trees)]
    return trees, [rng.normal(size=len(tree.leaves)) for tree in trees]


@given(
    num_trees=st.integers(0, 7),
    num_replicas=st.integers(1, 4),
    budget_tokens=st.integers(1, 400),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_tree_is_trained_once_and_all_replicas_have_equally_many_microbatches(
    num_trees, num_replicas, budget_tokens, seed
):
    trees, advantages = batch(num_trees, seed)
    shares = divide(trees, advantages, num_replicas=num_replicas, budget_tokens=budget_tokens)
    assert len(shares) == num_replicas
    assert len({len(share.microbatches) for share in shares}) == 1
    assert len(shares[0].microbatches) >= 1, "a schedule cannot run without a microbatch"
    found = []
    for share in shares:
        indices = [index for microbatch in share.microbatches for index in microbatch]
        assert indices == list(range(len(share.trees)))
        for microbatch in share.microbatches:
            size = sum(num_packed_tokens(share.trees[i]) for i in microbatch)
            assert size <= budget_tokens or len(microbatch) == 1
        found += [(id(t), id(a)) for t, a in zip(share.trees, share.advantages, strict=True)]
    assert sorted(found) == sorted((id(t), id(a)) for t, a in zip(trees, advantages, strict=True))


def test_a_share_without_trees_has_empty_microbatches():
    trees, advantages = batch(1)
    first, second = divide(trees, advantages, num_replicas=2, budget_tokens=10**6)
    assert (len(first.trees), first.microbatches) == (1, ((0,),))
    assert (len(second.trees), second.microbatches) == (0, ((),))


def test_bytes_carry_a_share_exactly():
    trees, advantages = batch(5)
    advantages[1][0] = np.nan
    for share in divide(trees, advantages, num_replicas=2, budget_tokens=150):
        found = Share.from_bytes(share.to_bytes())
        assert found.microbatches == share.microbatches
        assert found.to_bytes() == share.to_bytes()
        for a, b in zip(found.advantages, share.advantages, strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(found.trees, share.trees, strict=True):
            assert a.prompt.id == b.prompt.id
            assert [s.token_ids.tolist() for s in a.segments] == [
                s.token_ids.tolist() for s in b.segments
            ]


def test_bytes_carry_advantages_of_levels_with_their_shape():
    trees, _ = batch(3)
    advantages = batch_advantages(trees, "spo", whitened=True)
    assert len({a.shape for a in advantages}) > 1
    (share,) = divide(trees, advantages, num_replicas=1, budget_tokens=10**6)
    for found, expected in zip(
        Share.from_bytes(share.to_bytes()).advantages, advantages, strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_tree_without_advantages_is_refused():
    trees, advantages = batch(2)
    with pytest.raises(TreeError, match="2 trees and 1 rows of advantages"):
        divide(trees, advantages[:1], num_replicas=1, budget_tokens=100)
