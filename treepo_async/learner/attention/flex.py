"""Tree attention for CUDA: PyTorch's FlexAttention over the tiles that are not empty.

The kernel is compiled: for the first length it meets, then once for lengths in general. Going on without compilation would
compute all pairs, so beyond `MOST_COMPILATIONS` it is an error. Neighbours: `compiled` compiles, `tiles` finds the tiles,
`plan` chooses the backend.

Memory is O(T + tiles): `end`, and per tile four lists of an int32. A length that is no multiple of `TILE` is padded with tokens
that see themselves only, which copies queries, keys and values; packing to `plan.alignment` avoids that.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from treepo_async.learner.attention.compiled import compiled
from treepo_async.learner.attention.tiles import classify, listed

TILE = 128
"""Side of a tile: what the kernel's default block sizes divide."""

MOST_COMPILATIONS = 64
"""Of one process: kinds of heads, precisions, with and without gradient, each for one length and for lengths in general."""


class FlexPlan:
    """Attention over the forest that `end` describes."""

    def __init__(self, end: Tensor, kernel: Callable[..., Any] | None = None) -> None:
        """Find the tiles, without waiting for the device.

        Args:
            end: int32 [T], on the device that will compute.
            kernel: takes the arguments of `flex_attention`; None: that, compiled.
        """
        self.num_tokens = len(end)
        self.padding = -len(end) % TILE
        self.block_mask = block_mask(_padded(end, self.padding))
        self.kernel = kernel or _compiled()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend; see `plan.Plan`."""
        if self.padding:
            query, key, value = (F.pad(t, (0, 0, 0, self.padding)) for t in (query, key, value))
        mixed: Tensor = self.kernel(
            query, key, value, block_mask=self.block_mask, scale=scale, enable_gqa=True
        )
        return mixed[:, :, : self.num_tokens]


def block_mask(end: Tensor) -> BlockMask:
    """The tiles of a forest as FlexAttention takes them.

    Args:
        end: int32 [T], T a multiple of `TILE`.
    """

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    mixed, full = classify(end, TILE)
    lists = [part[None, None] for chosen in (mixed, full) for part in listed(chosen)]
    return BlockMask.from_kv_blocks(
        *lists, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(len(end), len(end))
    )


def _padded(end: Tensor, padding: int) -> Tensor:
    lone = torch.arange(len(end), len(end) + padding, dtype=end.dtype, device=end.device) + 1
    return torch.cat([end, lone])


@cache
def _compiled() -> Callable[..., Any]:
    return compiled(flex_attention, most=MOST_COMPILATIONS)
