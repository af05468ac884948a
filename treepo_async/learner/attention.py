"""Attention of a packed forest, as a Megatron module.

`TreeAttention` replaces `core_attention` in the layer spec. Neighbours: `pack` makes `end`, `model` builds the spec.

Invariant: `end` travels as an int32 tensor in Megatron's `attention_mask` slot, so activation recompute saves it and every
pipeline stage has it; nothing about a tree is kept on a module.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treepo_async.learner.mcore import MegatronModule


def visibility(end: Tensor) -> Tensor:
    """The mask of a forest, bool `[T, T]`: query `q` sees key `k` exactly when `k <= q < end[k]`.

    Args:
        end: int32 [T].
    """
    index = torch.arange(len(end), device=end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])


class TreeAttention(MegatronModule):
    """Scaled dot-product attention over the visible tokens of a packed forest."""

    def __init__(
        self, config: Any, *args: Any, softmax_scale: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **kwargs: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [T, 1, heads of this rank, D].
            key: [T, 1, query groups of this rank, D].
            value: as `key`.
            attention_mask: `end`, int32 [1, 1, 1, T].
            kwargs: what Megatron passes to every core attention and a forest does not need.

        Returns:
            [T, 1, heads * D].
        """
        # [T, 1, heads, D] to [1, heads, T, D]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visibility(attention_mask.flatten()),
            scale=self.scale,
            enable_gqa=True,
        )
        return mixed.permute(2, 0, 1, 3).flatten(start_dim=2)
