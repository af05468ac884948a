"""The process groups of the learner's ranks: tensor, pipeline and data parallel.

Neighbours: the worker opens them once per process before `build.build_learner`. A world of one rank is opened the same way.

Invariant: every group has an explicit timeout, so a rank that waits for a dead one fails instead of hanging.
"""

import json
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async.config.layout import Layout
from treepo_async.learner.mcore import parallel_state, tensor_parallel

Item = TypeVar("Item")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of the tensors that travel between stages, by name."""


def open_groups(
    layout: Layout, *, rank: int, address: str, timeout_s: float, local_rank: int = 0
) -> None:
    """Join this process to the learner's groups, over NCCL with CUDA and over gloo without.

    Args:
        layout: sizes; their product is the number of ranks that must join.
        rank: this process among them.
        address: `host:port` where rank 0 listens.
        timeout_s: longest wait of any collective, the joining included.
        local_rank: CUDA device of this process.
    """
    if layout.tp > 1:
        # read when CUDA starts; Megatron overlaps tensor-parallel collectives with matmuls under it
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with_cuda = torch.cuda.is_available()
    if with_cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if with_cuda else "gloo",
        init_method=f"tcp://{address}",
        rank=rank,
        world_size=layout.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        distributed_timeout_minutes=timeout_s / 60,
        # the ranks of a node follow each other: a pipeline is on as few nodes as can be (see cluster.placement)
        order="tp-cp-ep-pp-dp",
    )


def close_groups() -> None:
    """Leave the groups; a process may open others afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def seed_ranks(seed: int) -> None:
    """Seed every generator of this rank; needs opened groups.

    Megatron draws initial weights and dropout masks on CUDA from generators of its own, one per kind of region.
    """
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def device() -> torch.device:
    """Where this rank's tensors live."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def share_out(items: Sequence[Item], filler: Item) -> list[Item]:
    """This data-parallel rank's items, as many as every other rank's; what is short is filled up."""
    dp = parallel_state.get_data_parallel_world_size()
    num_fillers = -len(items) % dp if items else dp
    return [*items, *[filler] * num_fillers][parallel_state.get_data_parallel_rank() :: dp]


def add_up(values: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce in place over data-parallel ranks and pipeline stages; tensor-parallel ranks already agree."""
    dist.all_reduce(values, op=op, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(values, op=op, group=parallel_state.get_pipeline_model_parallel_group())


def sum_stages(values: Tensor) -> None:
    """Sum in place over the pipeline stages of this replica."""
    dist.all_reduce(values, group=parallel_state.get_pipeline_model_parallel_group())


def gather_shares(share: Tensor) -> list[Tensor]:
    """The shares of all tensor-parallel ranks, on the first of them; an empty list on the others."""
    group, share = parallel_state.get_tensor_model_parallel_group(), share.contiguous()
    shares = [torch.empty_like(share) for _ in range(group.size())] if group.rank() == 0 else []
    dist.gather(share, shares or None, group=group, group_dst=0)
    return shares


def to_first_stage(tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Bring the named tensors of all stages of a pipeline to its first, one at a time.

    Every rank of the pipeline must run it to its end.

    Yields:
        On the first stage its own tensors, then those of the second, and so on; nothing on the others.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.rank() > 0:
        _send(tensors, group)
        return
    yield from tensors
    for stage in range(1, group.size()):
        yield from _receive(stage, group)


def is_stage_lead() -> bool:
    """Whether this is the first rank of its pipeline stage, in the first replica: it has what `hf.export_stage` yields."""
    return bool(
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank() == 0
    )


def words_to_first_stage(words: Any) -> list[Any]:
    """Bring what JSON can say of every stage of this rank's pipeline to its first; nothing on the others.

    Every rank of the pipeline must call it.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.rank() > 0:
        _send_words(words, group)
        return []
    return [words, *(_receive_words(stage, group) for stage in range(1, group.size()))]


def _send(tensors: Iterator[tuple[str, Tensor]], group: Any) -> None:
    for name, tensor in tensors:
        dtype = str(tensor.dtype).removeprefix("torch.")
        _send_words([name, list(tensor.shape), dtype], group)
        dist.send(tensor, group=group, group_dst=0)
    _send_words(None, group)


def _receive(stage: int, group: Any) -> Iterator[tuple[str, Tensor]]:
    while (header := _receive_words(stage, group)) is not None:
        name, size, dtype = header
        tensor = torch.empty(size, dtype=_DTYPES[dtype], device=device())
        dist.recv(tensor, group=group, group_src=stage)
        yield name, tensor


def _send_words(words: Any, group: Any) -> None:
    """As JSON: torch's own way for objects would have the other end unpickle what it gets."""
    text = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8, device=device())
    dist.send(torch.tensor([len(text)], device=device()), group=group, group_dst=0)
    dist.send(text, group=group, group_dst=0)


def _receive_words(stage: int, group: Any) -> Any:
    size = torch.zeros(1, dtype=torch.int64, device=device())
    dist.recv(size, group=group, group_src=stage)
    text = torch.empty(int(size), dtype=torch.uint8, device=device())
    dist.recv(text, group=group, group_src=stage)
    return json.loads(bytes(text.tolist()))
