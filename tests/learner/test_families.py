"""Every supported architecture, tied and untied, against Hugging Face: log-probs, gradients and what is refused."""

import json

import numpy as np
import pytest
import torch

from tests.oracle import FAMILIES, exact, sequence_logprobs, tiny_model
from treepo_async.learner.shape import ModelShape

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

FAMILY = pytest.mark.parametrize("family", FAMILIES)
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
IDS = np.random.default_rng(5).integers(1, 128, 90, dtype=np.int32)
"""Long enough for every wave of the stretched embedding to turn."""


def shape_of(model):
    """Of what `save_pretrained` writes."""
    config = json.loads(model.config.to_json_string())
    return ModelShape.from_config(config | {"architectures": [type(model).__name__]})


def ours(theirs, **settings):
    from treepo_async.learner.model.gpt import ModelSettings, build_model
    from treepo_async.learner.model.hf import load

    shape = shape_of(theirs)
    model = build_model(shape, ModelSettings(**settings))
    load(model, shape, theirs.state_dict().__getitem__)
    return model


def logprobs_of(model, token_ids=IDS, dtype=torch.float32):
    from treepo_async.learner.packing.edges import Edges
    from treepo_async.learner.packing.pack import pack_sequences

    (batch,) = pack_sequences([token_ids], 10**6)
    edges = Edges.of(batch, torch.device("cpu"), dtype=dtype)
    output = model(
        input_ids=torch.from_numpy(batch.input_ids)[None],
        position_ids=torch.from_numpy(batch.position_ids)[None],
        attention_mask=torch.from_numpy(batch.end)[None, None, None],
        edges=edges,
    )
    return output[0]


def difference(found, expected):
    return float((found.double() - expected.double()).abs().max())


@FAMILY
@TIED
def test_log_probs_equal_those_of_hugging_face(family, tied):
    theirs = tiny_model(family, tied=tied, num_kv_heads=2)
    found = logprobs_of(ours(theirs))
    assert difference(found, sequence_logprobs(theirs, IDS)) < 1e-5
    other = tiny_model(family, tied=tied, num_kv_heads=2, seed=1)
    assert difference(found, sequence_logprobs(other, IDS)) > 1e-1


@FAMILY
@TIED
def test_in_float64_they_and_their_gradients_equal_to_ten_digits(family, tied):
    from treepo_async.learner.model.hf import export

    theirs = exact(tiny_model(family, tied=tied, num_kv_heads=2))
    model = ours(theirs, dtype=torch.float64)
    found, expected = logprobs_of(model, dtype=torch.float64), sequence_logprobs(theirs, IDS)
    assert found.dtype == torch.float64
    assert difference(found, expected) < 1e-10
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = dict(export(model, shape_of(theirs), lambda weight: weight.main_grad))
    for name, weight in theirs.named_parameters():
        assert difference(gradients[name], weight.grad) < 1e-10 * float(weight.grad.abs().max())


@pytest.mark.parametrize("change", ["rope_stretch", "rope_theta", "norm_epsilon"])
def test_control_a_constant_of_another_value_is_another_model(change):
    from dataclasses import replace

    from treepo_async.learner.model.gpt import build_model
    from treepo_async.learner.model.hf import load

    theirs = tiny_model("llama3.1", tied=False)
    changed = {"rope_stretch": None, "rope_theta": 1e4, "norm_epsilon": 1e-2}[change]
    shape = replace(shape_of(theirs), **{change: changed})
    model = build_model(shape)
    load(model, shape, theirs.state_dict().__getitem__)
    assert difference(logprobs_of(model), sequence_logprobs(theirs, IDS)) > 1e-3


def calls_of_attention(model):
    """One entry a call, as a list that grows."""
    from treepo_async.learner.attention.module import TreeAttention

    calls = []
    for module in model.modules():
        if isinstance(module, TreeAttention):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@FAMILY
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_activations_computed_again_give_the_same_gradients(family, recompute):
    theirs = tiny_model(family, tied=False)
    gradients = []
    for choice in ("none", recompute):
        model = ours(theirs, recompute=choice)
        calls = calls_of_attention(model)
        logprobs_of(model).square().sum().backward()
        assert len(calls) == 2 * (1 if choice == "none" else 2)  # of two layers
        gradients.append({n: p.main_grad.clone() for n, p in model.named_parameters()})
    kept, again = gradients
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert min(float(gradient.abs().max()) for gradient in kept.values()) > 0
