"""Tree attention as Megatron builds, calls and recomputes it."""

import numpy as np
import pytest
import torch

from tests.learner.forests import gradients, tensors, textbook, visible
from treepo_async.bench.forests import random_end
from treepo_async.errors import ConfigError

pytestmark = pytest.mark.engine

HEADS, GROUPS, DIM = 4, 2, 8


@pytest.fixture
def config(groups):
    from treepo_async.learner.groups import seed_ranks
    from treepo_async.learner.mcore import TransformerConfig

    seed_ranks(0)
    return TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=DIM,
        cuda_graph_scope=[],
    )


class Counted:
    """Makes plans and counts them."""

    def __init__(self, build):
        self.build, self.number = build, 0

    def __call__(self, end):
        self.number += 1
        return self.build(end)


def layers(config, backend, number):
    """Core attentions of as many layers, and the counter of their plans."""
    from treepo_async.learner.attention.module import core_attention

    spec = core_attention(backend)
    plans = spec.params["plans"]
    plans.build = Counted(plans.build)
    return [spec(config=config, layer_number=i + 1) for i in range(number)], plans.build


def forest(seed=0, num_tokens=90):
    rng = np.random.default_rng(seed)
    end = random_end(rng, num_tokens)
    # as Megatron has them, [T, 1, heads, D]
    inputs = [t.permute(2, 0, 1, 3) for t in tensors(rng, num_tokens, (HEADS, GROUPS), DIM)]
    return inputs, torch.from_numpy(end)[None, None, None]


@pytest.mark.parametrize("backend", ["auto", "dense", "cascade"])
def test_a_layer_is_the_textbook_in_megatrons_axes(config, backend):
    (layer,), _ = layers(config, backend, 1)
    inputs, mask = forest()
    sees = torch.from_numpy(visible(mask.flatten().numpy()))
    turned = [t.permute(1, 2, 0, 3) for t in inputs]
    expected = textbook(*turned, sees, DIM**-0.5)[0].transpose(0, 1)
    found = layer(*inputs, mask, attn_mask_type=None)
    assert found.shape == (90, 1, HEADS * DIM)
    assert torch.allclose(found, expected.reshape(90, 1, HEADS * DIM), atol=1e-12)


def test_without_plans_of_others_a_layer_is_dense(config):
    from treepo_async.learner.attention.module import TreeAttention

    inputs, mask = forest()
    (shared,), _ = layers(config, "dense", 1)
    assert torch.equal(TreeAttention(config)(*inputs, mask), shared(*inputs, mask))


@pytest.mark.parametrize("backend", ["dense", "cascade"])
def test_layers_make_one_plan_a_microbatch_and_recomputation_none(config, backend):
    from treepo_async.learner.mcore import tensor_parallel

    stack, counter = layers(config, backend, 3)
    inputs, mask = forest()

    def run(query, key, value, mask):
        for layer in stack:
            query = layer(query, key, value, mask).view(query.shape)
        return query

    plain = gradients(run(*inputs, mask), inputs)
    assert counter.number == 1
    again = forest()
    # Megatron's checkpoint wants backward(), not grad()
    out = tensor_parallel.checkpoint(run, False, *(leaves := roots(again[0])), again[1])
    assert counter.number == 2
    out.backward(weight_of(out))
    assert counter.number == 2
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


def roots(inputs):
    return [t.detach().requires_grad_() for t in inputs]


def weight_of(out):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64)


def test_microbatches_in_flight_keep_their_own_plans(config):
    stack, counter = layers(config, "cascade", 2)
    batches = [forest(seed, 40 + seed) for seed in range(3)]
    alone = [gradients(stack[0](*inputs, mask), inputs) for inputs, mask in batches]
    counter.number = 0
    outs = [stack[0](*inputs, mask) for inputs, mask in batches]
    [stack[1](*inputs, mask) for inputs, mask in batches]
    assert counter.number == 0
    for (inputs, _), out, expected in zip(batches, outs, alone, strict=True):
        for found, wanted in zip(gradients(out, inputs), expected, strict=True):
            assert torch.equal(found, wanted)


def test_an_unknown_backend_ends_the_building(groups):
    from treepo_async.learner.attention.module import core_attention

    with pytest.raises(ConfigError, match="is unknown"):
        core_attention("flax")


def test_a_longer_pipeline_keeps_more_plans():
    from treepo_async.learner.attention.module import core_attention

    kept = [core_attention("dense", num_stages=n).params["plans"].capacity for n in (1, 8)]
    assert kept == [4, 9]
