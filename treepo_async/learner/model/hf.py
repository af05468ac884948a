"""Hugging Face tensors to Megatron shards and back, exact in both directions.

Neighbours: `names` has the map, `hf_files` reads a checkpoint's files, `gpt` builds what `load` fills; a publisher writes what
`export` yields. The map is a bijection: `_cut` takes this rank's share of one Megatron parameter from HF tensors, `_join` makes the HF
tensors of one full parameter. It holds for whatever else has one number per weight, a gradient or a moment of Adam: `TensorOf` says
what stands at a parameter.

Invariants: no arithmetic touches a weight, so a round trip in one dtype is `torch.equal`; a rank holds one tensor at a time beside its
own share, and of a tensor in a file reads no more than that share.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from treepo_async.errors import ConfigError
from treepo_async.learner.groups import device, gather_shares, to_first_stage
from treepo_async.learner.mcore import get_transformer_layer_offset, parallel_state
from treepo_async.learner.model.names import (
    EMBEDDING,
    GATE_AND_UP,
    OUTPUT_LAYER,
    QKV,
    SPLIT,
    Size,
    hf_names,
    inner_name,
    qkv_rows,
    tensor_sizes,
)
from treepo_async.learner.shape import ModelShape

DUMMY_STD = 0.02

Read = Callable[[str], Any]
"""HF name -> the full tensor, or what gives its parts when sliced and its size by `get_shape`, as safetensors does."""

TensorOf = Callable[[nn.Parameter], Tensor]
"""Parameter -> the tensor of its shape that is meant: itself, its gradient, a moment of it."""


def itself(weight: nn.Parameter) -> Tensor:
    """The `TensorOf` of the weights."""
    return weight


@dataclass(frozen=True, slots=True)
class _Parameter:
    """One Megatron parameter of this stage."""

    name: str
    """Inside its layer; outside the layers the whole name."""
    hf_names: tuple[str, ...]
    weight: nn.Parameter


@torch.no_grad()
def load(model: nn.Module, shape: ModelShape, read: Read, tensor_of: TensorOf = itself) -> None:
    """Fill this rank's parameters, or what stands at them, from HF tensors, one at a time.

    Args:
        model: from `gpt.build_model`.
        shape: the shape it was built from.
        read: from `hf_files.open_checkpoint` or of any other origin; a tied output layer is read as the embedding.
        tensor_of: parameter to the tensor to fill in its place.

    Raises:
        ConfigError: a tensor's size is not the one config.json promises.
    """
    sizes = tensor_sizes(shape)

    def take(name: str) -> Any:
        source = read(name)
        size = _size(source)
        if size != sizes[name]:
            raise ConfigError(
                f"{name}: the checkpoint gives {list(size)}, config.json promises {list(sizes[name])}"
            )
        return source

    for parameter in _parameters(model, shape):
        sources = [take(name) for name in parameter.hf_names]
        tensor_of(parameter.weight).copy_(_cut(parameter.name, shape, sources))


@torch.no_grad()
def export(
    model: nn.Module, shape: ModelShape, tensor_of: TensorOf = itself
) -> Iterator[tuple[str, Tensor]]:
    """Yield the HF tensors of the whole model on global rank 0, first stage to last, and nothing on any other rank.

    Every rank must run it to its end; rank 0 holds one tensor of another rank at a time. A tied output layer is left
    out, as in HF checkpoints.

    Args:
        model: from `gpt.build_model`.
        shape: the shape it was built from.
        tensor_of: parameter to the tensor to export in its place.

    Yields:
        HF name and full tensor, detached and contiguous; it may share memory with this rank's own, so it is valid
        until the next optimizer step.
    """
    if parallel_state.get_data_parallel_rank() == 0:
        yield from to_first_stage(export_stage(model, shape, tensor_of))


def dummy(shape: ModelShape, seed: int) -> Read:
    """Tensors of a model that nobody trained: norms of 1, no biases, all else normal; by the seed alone, whatever the layout."""
    sizes, where = tensor_sizes(shape), device()

    def read(name: str) -> Tensor:
        size = sizes[name]
        if len(size) == 1:
            fill = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(size, fill, device=where)
        generator = torch.Generator(where).manual_seed(seed + crc32(name.encode()))
        return torch.randn(size, generator=generator, device=where).mul_(DUMMY_STD)

    return read


@torch.no_grad()
def export_stage(
    model: nn.Module, shape: ModelShape, tensor_of: TensorOf = itself
) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors of this pipeline stage on its first tensor-parallel rank; nothing on the others, which must run it too.

    Args, Yields: see `export`.
    """
    for parameter in _parameters(model, shape):
        if parameter.name == OUTPUT_LAYER and shape.tied:
            continue
        tensor = tensor_of(parameter.weight)
        shares = gather_shares(tensor) if parameter.name in SPLIT else [tensor]
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            fulls = _join(parameter.name, shares, shape)
            for name, full in zip(parameter.hf_names, fulls, strict=True):
                yield name, full.detach().contiguous()


def _parameters(model: Any, shape: ModelShape) -> Iterator[_Parameter]:
    while hasattr(model, "module"):
        model = model.module
    offset = get_transformer_layer_offset(model.config)
    for name, weight in model.named_parameters():
        is_tied = name == OUTPUT_LAYER and shape.tied
        names = (EMBEDDING,) if is_tied else hf_names(name, first_layer=offset)
        yield _Parameter(inner_name(name), names, weight)


def _cut(name: str, shape: ModelShape, sources: Sequence[Any]) -> Tensor:
    """This rank's share of a parameter."""
    sizes = [_size(source) for source in sources]
    if name not in SPLIT:
        return sources[0][:]
    if name.startswith(QKV):
        start, stop = _own_range(sum(size[0] for size in sizes))
        return torch.cat([sources[x][a:b] for x, a, b in qkv_rows(shape, start, stop)])
    start, stop = _own_range(sizes[0][SPLIT[name]])
    if SPLIT[name] == 1:
        return sources[0][:, start:stop]
    return torch.cat([source[start:stop] for source in sources])


def _join(name: str, shares: list[Tensor], shape: ModelShape) -> Iterator[Tensor]:
    """The HF tensors a parameter holds, from the shares of all tensor-parallel ranks."""
    if name not in SPLIT:
        yield shares[0]
    elif name.startswith(QKV):
        full = torch.cat(shares)
        grouped = full.view(shape.num_kv_heads, -1, shape.head_dim, *full.shape[1:])
        num_queries = shape.num_heads // shape.num_kv_heads
        for part in grouped.split([num_queries, 1, 1], dim=1):
            yield part.flatten(0, 2)
    elif name.startswith(GATE_AND_UP):
        for half in zip(*(share.chunk(2) for share in shares), strict=True):
            yield torch.cat(half)
    else:
        yield torch.cat(shares, dim=SPLIT[name]) if len(shares) > 1 else shares[0]


def _size(source: Any) -> Size:
    return tuple(source.shape if isinstance(source, Tensor) else source.get_shape())


def _own_range(size: int) -> tuple[int, int]:
    each = size // parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return rank * each, (rank + 1) * each
