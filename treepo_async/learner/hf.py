"""Hugging Face safetensors to Megatron shards and back, exact in both directions.

Neighbours: `model` builds what `load` fills; a publisher writes what `export` yields. The map is a bijection: `_cut` takes
this rank's share of one Megatron parameter from HF tensors, `_join` makes the HF tensors of one full parameter. It holds
for whatever else has one number per weight, a gradient or a moment of Adam: `TensorOf` says what stands at a parameter.

Invariant: no arithmetic touches a weight, so a round trip in one dtype is `torch.equal`.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from treepo_async.errors import ConfigError
from treepo_async.learner.groups import gather_shares, to_first_stage
from treepo_async.learner.mcore import get_transformer_layer_offset, parallel_state
from treepo_async.learner.shape import ModelShape

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
"""Megatron name to HF name outside the layers."""

INNER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
"""Megatron name to HF name inside a layer, where one tensor is one tensor."""

ROW_PARALLEL = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""Parameters whose columns, rather than rows, are split over tensor-parallel ranks."""

Read = Callable[[str], Tensor]
"""HF name -> full tensor."""

TensorOf = Callable[[nn.Parameter], Tensor]
"""Parameter -> the tensor of its shape that is meant: itself, its gradient, a moment of it."""


def itself(weight: nn.Parameter) -> Tensor:
    """The `TensorOf` of the weights."""
    return weight


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One Megatron parameter of this stage, under its place in the whole model."""

    prefix: str
    """`model.layers.<i>.`, empty outside the layers."""
    name: str
    """Its Megatron name inside the layer, the whole name outside."""
    weight: nn.Parameter

    @property
    def sharded(self) -> bool:
        return getattr(self.weight, "tensor_model_parallel", False)

    @property
    def dim(self) -> int:
        return 1 if self.name in ROW_PARALLEL else 0


def open_checkpoint(model_dir: Path) -> Read:
    """Reader of single tensors of a checkpoint of one safetensors file or several with an index.

    Raises:
        ConfigError: the directory has neither, and from the reader: a tensor is missing.
    """
    index, single = model_dir / INDEX_FILE, model_dir / SINGLE_FILE
    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif single.is_file():
        with safe_open(single, "pt") as tensors:
            files = dict.fromkeys(tensors.keys(), SINGLE_FILE)
    else:
        raise ConfigError(
            f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face model directory"
        )

    def read(name: str) -> Tensor:
        if name not in files:
            raise ConfigError(f"{model_dir} has no tensor {name!r}; its config.json promises one")
        with safe_open(model_dir / files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    return read


@torch.no_grad()
def load(model: nn.Module, shape: ModelShape, read: Read, tensor_of: TensorOf = itself) -> None:
    """Fill this rank's parameters, or what stands at them, from HF tensors, one at a time.

    Args:
        model: from `model.build_model`.
        shape: the shape it was built from.
        read: from `open_checkpoint` or of any other origin; a tied output layer is read as the embedding.
        tensor_of: parameter to the tensor to fill in its place.

    Raises:
        ConfigError: a tensor's shape is not the one config.json promises.
    """
    for parameter in _parameters(model):
        share = _cut(parameter, shape, read)
        if share.shape != parameter.weight.shape:
            raise ConfigError(
                f"{parameter.prefix}{parameter.name}: the checkpoint gives {list(share.shape)}, "
                f"config.json promises {list(parameter.weight.shape)}"
            )
        tensor_of(parameter.weight).copy_(share)


@torch.no_grad()
def export(
    model: nn.Module, shape: ModelShape, tensor_of: TensorOf = itself
) -> Iterator[tuple[str, Tensor]]:
    """Yield the HF tensors of the whole model on global rank 0, first stage to last, and nothing on any other rank.

    Every rank must run it to its end; rank 0 holds one tensor of another rank at a time. A tied output layer is left
    out, as in HF checkpoints.

    Args:
        model: from `model.build_model`.
        shape: the shape it was built from.
        tensor_of: parameter to the tensor to export in its place.

    Yields:
        HF name and full tensor, detached and contiguous; it may share memory with this rank's own, so it is valid
        until the next optimizer step.
    """
    if parallel_state.get_data_parallel_rank() == 0:
        yield from to_first_stage(_export_stage(model, shape, tensor_of))


def _export_stage(
    model: nn.Module, shape: ModelShape, tensor_of: TensorOf
) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors of this pipeline stage on its first tensor-parallel rank; nothing on the others."""
    for parameter in _parameters(model):
        if parameter.name == "output_layer.weight" and shape.tied:
            continue
        tensor = tensor_of(parameter.weight)
        shares = gather_shares(tensor) if parameter.sharded else [tensor]
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for name, full in _join(parameter, shares, shape):
                yield name, full.detach().contiguous()


def _parameters(model: nn.Module) -> Iterator[_Parameter]:
    module = getattr(model, "module", model)
    offset = get_transformer_layer_offset(module.config)
    for name, weight in module.named_parameters():
        if name in OUTER:
            yield _Parameter("", name, weight)
        else:
            _, _, layer, inner = name.split(".", 3)
            yield _Parameter(f"model.layers.{int(layer) + offset}.", inner, weight)


def _cut(parameter: _Parameter, shape: ModelShape, read: Read) -> Tensor:
    """This rank's share of a parameter."""
    prefix, name = parameter.prefix, parameter.name
    if name == "output_layer.weight" and shape.tied:
        return _share(read(OUTER["embedding.word_embeddings.weight"]), 0)
    if name.startswith("self_attention.linear_qkv."):
        kind = name.rpartition(".")[2]
        parts = [read(f"{prefix}self_attn.{x}_proj.{kind}") for x in "qkv"]
        # Megatron interleaves by group: the queries of a group, then its key, then its value; with more ranks
        # than groups a share is a piece of a group
        grouped = [part.reshape(shape.num_kv_heads, -1, *part.shape[1:]) for part in parts]
        return _share(torch.cat(grouped, dim=1).flatten(0, 1), 0)
    if name == "mlp.linear_fc1.weight":
        return torch.cat([_share(read(f"{prefix}mlp.{x}_proj.weight"), 0) for x in ("gate", "up")])
    full = read(prefix + INNER[name]) if prefix else read(OUTER[name])
    return _share(full, parameter.dim) if parameter.sharded else full


def _join(
    parameter: _Parameter, shares: list[Tensor], shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors a parameter holds, from the shares of all tensor-parallel ranks."""
    prefix, name = parameter.prefix, parameter.name
    if name.startswith("self_attention.linear_qkv."):
        kind = name.rpartition(".")[2]
        full = torch.cat(shares)
        grouped = full.view(shape.num_kv_heads, -1, shape.head_dim, *full.shape[1:])
        num_queries = shape.num_heads // shape.num_kv_heads
        parts = grouped.split([num_queries, 1, 1], dim=1)
        for x, part in zip("qkv", parts, strict=True):
            yield f"{prefix}self_attn.{x}_proj.{kind}", part.flatten(0, 2)
    elif name == "mlp.linear_fc1.weight":
        halves = zip(*(share.chunk(2) for share in shares), strict=True)
        for x, half in zip(("gate", "up"), halves, strict=True):
            yield f"{prefix}mlp.{x}_proj.weight", torch.cat(half)
    else:
        hf_name = prefix + INNER[name] if prefix else OUTER[name]
        yield hf_name, torch.cat(shares, dim=parameter.dim) if len(shares) > 1 else shares[0]


def _share(full: Tensor, dim: int) -> Tensor:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return full.chunk(tp, dim)[parallel_state.get_tensor_model_parallel_rank()]
