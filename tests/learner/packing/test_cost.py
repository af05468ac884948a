import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree, visible_by_ancestors
from treepo_async.errors import ConfigError
from treepo_async.learner.packing.cost import SPEEDS, CostModel, Load, flops, load_of
from treepo_async.learner.packing.pack import pack
from treepo_async.learner.packing.piece import Piece
from treepo_async.learner.shape import ModelShape

QWEN_7B = ModelShape(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    rope_theta=1e6,
    norm_epsilon=1e-6,
    max_position_embeddings=32768,
    tied=False,
)


def runs(batch):
    """Runs of packed tokens of which each is the only one that goes on from the one before it."""
    end = batch.end.astype(np.int64)
    goes_on = (end[1:] == end[:-1]) & (end[:-1] > np.arange(1, len(end)))
    return len(end) - int(np.count_nonzero(goes_on))


@given(seed=st.integers(0, 500), size=st.integers(1, 20), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_load_is_what_is_packed(seed, size, data):
    tree = random_tree(np.random.default_rng(seed), num_segments=size)
    leaves = data.draw(
        st.lists(st.sampled_from(range(len(tree.leaves))), min_size=1, unique=True), "leaves"
    )
    zeros = np.zeros(len(tree.leaves))
    (batch,) = pack([tree], [zeros], [zeros], [[Piece(0, tuple(leaves))]])
    load = load_of(tree, leaves)
    assert load.tokens == batch.num_tokens
    assert load.pairs == (batch.end - np.arange(batch.num_tokens)).sum()
    assert load.trained == batch.num_trained_tokens
    assert load.nodes == runs(batch)


def test_the_pairs_of_a_whole_tree_are_those_that_ancestors_define():
    tree = random_tree(np.random.default_rng(1), num_segments=15)
    assert load_of(tree, range(len(tree.leaves))).pairs == visible_by_ancestors(tree).sum()


def test_loads_add_up():
    assert Load(1, 2, 3, 4) + Load(10, 20, 30, 40) == Load(11, 22, 33, 44)


def test_flops_of_a_7b_model_are_those_of_its_weights():
    one_token = flops(QWEN_7B, Load(tokens=1))
    assert one_token.matmul == pytest.approx(6 * 6.525e9, rel=1e-3)
    assert flops(QWEN_7B, Load(trained=1)).matmul == pytest.approx(6 * 0.545e9, rel=1e-3)
    assert flops(QWEN_7B, Load(pairs=1)).attention == 3.5 * 401_408
    assert flops(QWEN_7B, Load(2, 3, 5, 7)).total == pytest.approx(
        2 * one_token.total + 5 * 6 * 3584 * 152064 + 3 * 3.5 * 401_408
    )


def test_a_cost_is_a_sum_over_what_the_load_consists_of():
    model = CostModel(per_token=2.0, per_pair=3.0, per_trained=5.0, per_node=7.0)
    assert model.cost(Load(1, 10, 100, 1000)) == 2 + 30 + 500 + 7000
    assert CostModel().cost(Load(4, 10, 100, 1000)) == 4


@pytest.mark.parametrize("attention", SPEEDS)
def test_seconds_are_flops_by_the_speed_of_their_kind(attention):
    load, speed = Load(tokens=1000, pairs=100_000, trained=900), SPEEDS[attention]
    model = CostModel.of(QWEN_7B, attention, microbatch_tokens=100)
    done = flops(QWEN_7B, load)
    assert model.cost(load) >= done.matmul / speed.matmul + done.attention / speed.attention


def test_dense_attention_pays_for_every_pair_of_a_microbatch():
    model = CostModel.of(QWEN_7B, "dense", microbatch_tokens=4096)
    few, many = Load(tokens=1000, pairs=1000), Load(tokens=1000, pairs=500_000)
    assert model.cost(few) == model.cost(many)
    other = CostModel.of(QWEN_7B, "flex", microbatch_tokens=4096)
    assert other.cost(few) < other.cost(many)


def test_an_attention_without_a_known_speed_is_refused():
    with pytest.raises(ConfigError, match="'flash' is unknown; it is one of dense, cascade, flex"):
        CostModel.of(QWEN_7B, "flash", microbatch_tokens=1)
