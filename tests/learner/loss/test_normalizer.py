"""What a token weighs by each normalizer, and that it is that of the whole update."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.config.schema import NORMALIZERS
from treepo_async.errors import ConfigError
from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.tree.levels import level_tokens

SEEDS = st.integers(0, 2**32 - 1)


def batch(seed, *, nan_share=0.3, **kind):
    rng = np.random.default_rng(seed)
    trees = [
        random_tree(rng, num_segments=int(rng.integers(1, 12)), nan_share=nan_share, **kind)
        for _ in range(3)
    ]
    return trees, [tree.rewards_L.astype(np.float64) for tree in trees]


def total(trees, advantages, normalizer):
    """Summed weight of every token of every counted trajectory."""
    weights = loss_weights(trees, advantages, normalizer)
    return sum(
        float((level_tokens(tree) * (w if w.ndim == 2 else w[:, None]))[~np.isnan(a)].sum())
        for tree, w, a in zip(trees, weights, advantages, strict=True)
    )


@pytest.mark.parametrize("normalizer", ["token_mean", "sequence_mean", "unique_token"])
@given(SEEDS)
@settings(max_examples=40, deadline=None)
def test_the_weights_of_all_trained_tokens_add_up_to_one(normalizer, seed):
    trees, advantages = batch(seed)
    any_counted = any((~np.isnan(a)).any() for a in advantages)
    assert total(trees, advantages, normalizer) == pytest.approx(float(any_counted))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_batch_with_nothing_counted_has_finite_weights(normalizer):
    trees, advantages = batch(1, nan_share=1.0)
    assert all(np.isnan(a).all() for a in advantages)
    for weights in loss_weights(trees, advantages, normalizer):
        assert np.isfinite(weights).all()
    assert loss_weights([], [], normalizer) == []


def test_weights_of_a_small_tree_by_hand():
    """Two levels of two tokens; leaves 0 and 1 share the first level, leaf 2 is two tokens, leaf 3 is not scored."""
    shape = [(-1, 0, 2), (0, 1, 2), (0, 1, 2), (-1, 0, 2), (-1, 0, 2)]
    trees = (
        random_tree(np.random.default_rng(seed), num_segments=5, segment_tokens=2)
        for seed in itertools.count()
    )
    tree = next(t for t in trees if [(s.parent, s.level, len(s)) for s in t.segments] == shape)
    advantages = [np.array([1.0, -1.0, 1.0, np.nan])]
    found = {name: loss_weights([tree], advantages, name)[0][:3].tolist() for name in NORMALIZERS}
    assert found["token_mean"] == pytest.approx([1 / 10] * 3)
    assert found["sequence_mean"] == pytest.approx([1 / 12, 1 / 12, 1 / 6])
    assert found["dr_grpo"] == pytest.approx([1 / 24] * 3)
    # 8 unique tokens, of which 2 are in two trajectories
    assert found["unique_token"][0] == pytest.approx([1 / 16, 1 / 8])
    assert found["unique_token"][1] == pytest.approx([1 / 16, 1 / 8])
    assert found["unique_token"][2][0] == pytest.approx(1 / 8)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_weights_are_those_of_the_whole_update_and_not_of_each_tree(normalizer):
    trees, advantages = batch(3, nan_share=0.0)
    whole = loss_weights(trees, advantages, normalizer)
    alone = loss_weights(trees[:1], advantages[:1], normalizer)
    assert (whole[0] < alone[0]).all()


def test_an_unknown_normalizer_is_refused():
    with pytest.raises(ConfigError, match=r"learner\.normalizer=mean is unknown"):
        loss_weights([], [], "mean")
