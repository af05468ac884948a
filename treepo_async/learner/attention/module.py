"""Attention of a packed forest, as a Megatron module.

`core_attention` goes into the layer spec where Megatron's own attention stood. Neighbours: `plan` has the backends,
`pack` makes `end`, `gpt` builds the spec.

Invariant: `end` travels as an int32 tensor in Megatron's `attention_mask` slot, so activation recompute saves it and every
pipeline stage has it. What a module knows of a forest is in the plan cache that the layers share, found by that tensor.
"""

from typing import Any

from torch import Tensor

from treepo_async.learner.attention.plan import DENSE, PlanCache, kept_plans, planner
from treepo_async.learner.mcore import MegatronModule, ModuleSpec


def core_attention(backend: str, *, num_stages: int = 1) -> ModuleSpec:
    """The `core_attention` of a layer spec; all layers that are built from it share the plan of a microbatch.

    Args:
        backend: one of `config.schema.ATTENTIONS`.
        num_stages: of the pipeline.

    Raises:
        ConfigError: there is no such backend, or not on this machine.
    """
    plans = PlanCache(planner(backend), capacity=kept_plans(num_stages))
    return ModuleSpec(module=TreeAttention, params={"plans": plans})


class TreeAttention(MegatronModule):
    """Scaled dot-product attention over the visible tokens of a packed forest."""

    def __init__(
        self,
        config: Any,
        *args: Any,
        plans: PlanCache | None = None,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Put together.

        Args:
            config: Megatron's.
            args: what Megatron passes to every core attention and a forest does not need.
            plans: shared by the layers; None: the dense backend, not shared.
            softmax_scale: None: by the head dimension.
            kwargs: as `args`.
        """
        super().__init__(config=config)
        self.plans = plans or PlanCache(planner(DENSE))
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
        mixed = self.plans.of(attention_mask.flatten())(query, key, value, self.scale)
        return mixed.permute(2, 0, 1, 3).flatten(start_dim=2)
