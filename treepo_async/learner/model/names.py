"""Which Hugging Face tensors a Megatron parameter holds, and how it is split; pure names and numbers.

Neighbour: `hf` moves the tensors. The names are those of Megatron's own layers and of its Transformer Engine layers, which keep
the weight of a norm inside the projection that follows it.
"""

from collections.abc import Iterator
from typing import TypeAlias

from treepo_async.learner.shape import ModelShape

Size: TypeAlias = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
OUTPUT_LAYER = "output_layer.weight"

OUTER = {
    "embedding.word_embeddings.weight": EMBEDDING,
    OUTPUT_LAYER: "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
"""Megatron name to HF name outside the layers."""

QKV, GATE_AND_UP = "self_attention.linear_qkv", "mlp.linear_fc1"
"""What holds several HF tensors; a norm in front of it is not among these."""

INNER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    f"{QKV}.layer_norm_weight": ("input_layernorm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    f"{GATE_AND_UP}.layer_norm_weight": ("post_attention_layernorm.weight",),
    f"{QKV}.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    f"{QKV}.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    f"{GATE_AND_UP}.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
"""Megatron name to HF names inside a layer."""

SPLIT = {
    "embedding.word_embeddings.weight": 0,
    OUTPUT_LAYER: 0,
    f"{QKV}.weight": 0,
    f"{QKV}.bias": 0,
    "self_attention.linear_proj.weight": 1,
    f"{GATE_AND_UP}.weight": 0,
    "mlp.linear_fc2.weight": 1,
}
"""The dimension over which tensor-parallel ranks split a parameter; what is not here they all have."""


def inner_name(name: str) -> str:
    """A Megatron parameter's name inside its layer; outside the layers, its whole name."""
    return name if name in OUTER else name.split(".", 3)[3]


def hf_names(name: str, *, first_layer: int = 0) -> tuple[str, ...]:
    """The HF tensors that a Megatron parameter holds, in its order.

    Args:
        name: in a stage's model, e.g. `decoder.layers.0.mlp.linear_fc1.weight`.
        first_layer: of the stage, among all layers.

    Raises:
        KeyError: no supported model has such a parameter.
    """
    if name in OUTER:
        return (OUTER[name],)
    _, _, layer, inner = name.split(".", 3)
    return tuple(f"model.layers.{int(layer) + first_layer}.{x}" for x in INNER[inner])


def tensor_sizes(shape: ModelShape) -> dict[str, Size]:
    """Every tensor of an HF checkpoint of this shape, with its size."""
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_dim
    keys, mlp = shape.num_kv_heads * shape.head_dim, shape.intermediate_size
    layer: dict[str, Size] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "mlp.down_proj.weight": (hidden, mlp),
    }
    if shape.qkv_bias:
        layer |= {
            f"self_attn.{x}_proj.bias": (n,)
            for x, n in zip("qkv", (queries, keys, keys), strict=True)
        }
    if shape.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (shape.head_dim,) for x in "qk"}
    sizes: dict[str, Size] = {EMBEDDING: (shape.vocab_size, hidden)}
    for i in range(shape.num_layers):
        sizes |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    sizes["model.norm.weight"] = (hidden,)
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocab_size, hidden)
    return sizes


def qkv_rows(shape: ModelShape, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Which rows of q, k and v the rows `start` to `stop` of Megatron's joint projection are.

    It interleaves by group: the queries of a group, then its key, then its value. With more ranks than groups a rank's share is a
    piece of a group, and it may begin inside of a head.

    Yields:
        (0, 1 or 2 for q, k or v; first row; row after the last), in order.
    """
    num_queries = shape.num_heads // shape.num_kv_heads * shape.head_dim
    begin = 0
    for group in range(shape.num_kv_heads):
        for part, size in enumerate((num_queries, shape.head_dim, shape.head_dim)):
            first, last = max(start, begin), min(stop, begin + size)
            if first < last:
                shift = group * size - begin
                yield part, first + shift, last + shift
            begin += size
