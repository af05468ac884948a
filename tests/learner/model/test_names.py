"""The map of names, without Megatron, Transformer Engine or a model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.learner.model.names import hf_names, inner_name, qkv_rows, tensor_sizes
from treepo_async.learner.shape import ModelShape


def shape_of(*, num_heads=4, num_kv_heads=4, head_dim=8, **more):
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3}
    constants = {"rope_theta": 1e4, "norm_epsilon": 1e-6, "max_position_embeddings": 64}
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return ModelShape(**sizes, **heads, **constants, **({"tied": False} | more))


OUTER = {
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
}
SHARED = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
LOCAL = SHARED | {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
TRANSFORMER_ENGINE = SHARED | {
    "self_attention.linear_qkv.layer_norm_weight",
    "mlp.linear_fc1.layer_norm_weight",
}
QK_NORM = {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}


@pytest.mark.parametrize("layer", [LOCAL, TRANSFORMER_ENGINE], ids=["local", "transformer-engine"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_either_kind_of_layer_holds_every_tensor_of_a_checkpoint_once(layer, family):
    layer = set(layer)
    layer |= QK_NORM if family == "qwen3" else set()
    layer |= {"self_attention.linear_qkv.bias"} if family == "qwen2" else set()
    names = [f"decoder.layers.{i}.{inner}" for i in range(3) for inner in layer]
    found = [hf_name for name in [*OUTER, *names] for hf_name in hf_names(name)]
    shape = shape_of(qkv_bias=family == "qwen2", qk_norm=family == "qwen3")
    assert sorted(found) == sorted(tensor_sizes(shape))


def test_layers_are_counted_from_the_first_of_the_stage():
    name = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    assert hf_names(name, first_layer=6) == ("model.layers.7.input_layernorm.weight",)
    assert inner_name(name) == "self_attention.linear_qkv.layer_norm_weight"
    assert inner_name("output_layer.weight") == "output_layer.weight"


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError):
        hf_names("decoder.layers.0.mlp.router.weight")


def test_a_tied_checkpoint_has_no_output_layer():
    tied, untied = (tensor_sizes(shape_of(tied=tied)) for tied in (True, False))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


@given(
    groups=st.integers(1, 6),
    queries=st.integers(1, 4),
    head_dim=st.integers(1, 5),
    data=st.data(),
)
def test_any_rows_of_the_joint_projection_are_found_in_their_tensors(
    groups, queries, head_dim, data
):
    shape = shape_of(num_heads=groups * queries, num_kv_heads=groups, head_dim=head_dim)
    joint = []
    for group in range(groups):
        for part, heads in enumerate((queries, 1, 1)):
            first = group * heads * head_dim
            joint += [(part, row) for row in range(first, first + heads * head_dim)]
    start = data.draw(st.integers(0, len(joint)))
    stop = data.draw(st.integers(start, len(joint)))
    found = [(x, row) for x, a, b in qkv_rows(shape, start, stop) for row in range(a, b)]
    assert found == joint[start:stop]
