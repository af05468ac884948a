"""Tree attention for CPUs: PyTorch's flash kernel, one call for a block of queries over the keys of its path.

Masked pairs are computed for a block's own keys and at most as many of its path, nothing is quadratic in memory, keys and values
are not repeated for grouped heads (the heads of a group are rows of one call), and no partial results are merged. Exact in float64.

Neighbours: `paths` divides the forest, `plan` chooses the backend. Axis letters: `T` tokens, `G` key-value heads, `R`
query heads of each, `H` = G * R, `D` head dimension, `C` queries and `K` keys of a step.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from treepo_async.learner.attention.paths import BLOCK, Step, Steps, divide

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class CascadePlan:
    """Attention over the forest that `end` describes."""

    def __init__(self, end: Tensor, block: int = BLOCK) -> None:
        """Divide the forest.

        Args:
            end: int32 [T], on the CPU.
            block: most queries of a call.

        Raises:
            TreeError: `end` describes no forest.
        """
        self.plan = _Plan(divide(end.long().numpy(), block))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend: [1, H, T, D], [1, G, T, D] and [1, G, T, D] to [1, H, T, D]."""
        groups = key.shape[1]
        # [G, T, R, D], a view
        query_GTRD = query[0].unflatten(0, (groups, -1)).transpose(1, 2)
        out_GTRD = _Cascade.apply(query_GTRD, key[0], value[0], self.plan, scale)
        return out_GTRD.transpose(1, 2).flatten(0, 1)[None]


class _Plan:
    """The steps with their masks as tensors."""

    def __init__(self, forest: Steps) -> None:
        self.steps, self.lone, self.height = forest.steps, forest.lone, forest.height
        sizes = {step.num_own for step in forest.steps if step.mask is None}
        causal = {size: _additive(np.tri(size, dtype=bool)) for size in sizes}
        self.masks = {
            step.start: causal[step.num_own] if step.mask is None else _additive(step.mask)
            for step in forest.steps
        }
        """Of the top keys of each step, by its first query; causal ones of a size are one object."""


def _additive(mask: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.where(mask, np.float32(0), -np.float32(np.inf)))


class _Cascade(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_GTRD: Tensor, key_GTD: Tensor, value_GTD: Tensor, plan: _Plan, scale: float
    ) -> Tensor:
        out_GTRD = torch.empty_like(query_GTRD)
        for start, stop in plan.lone:
            out_GTRD[:, start:stop] = value_GTD[:, start:stop, None]
        keys, values = _Stack(key_GTD, plan), _Stack(value_GTD, plan)
        masks, logsumexps = _Masks(query_GTRD, plan), []
        for step in plan.steps:
            out, logsumexp = _forward(
                _rows(query_GTRD, step),
                keys.push(step),
                values.push(step),
                attn_mask=masks.of(step),
                scale=scale,
            )
            _put(out_GTRD, step, out)
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query_GTRD, key_GTD, value_GTD, out_GTRD, *logsumexps)
        ctx.plan, ctx.scale = plan, scale
        return out_GTRD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_GTRD: Tensor) -> tuple[Tensor | None, ...]:
        query_GTRD, key_GTD, value_GTD, out_GTRD, *logsumexps = ctx.saved_tensors
        plan: _Plan = ctx.plan
        grad_query = torch.empty_like(query_GTRD)
        keys, values = _Stack(key_GTD, plan), _Stack(value_GTD, plan)
        grad_keys, grad_values = _GradStack(key_GTD, plan), _GradStack(value_GTD, plan)
        for start, stop in plan.lone:
            grad_query[:, start:stop] = 0
            grad_values.grad_GTD[:, start:stop] = grad_GTRD[:, start:stop].sum(dim=2)
        masks = _Masks(query_GTRD, plan)
        for step, logsumexp in zip(reversed(plan.steps), reversed(logsumexps), strict=True):
            of_query, of_key, of_value = _backward(
                _rows(grad_GTRD, step),
                _rows(query_GTRD, step),
                keys.go_back(step),
                values.go_back(step),
                _rows(out_GTRD, step),
                logsumexp,
                0.0,
                False,
                attn_mask=masks.of(step),
                scale=ctx.scale,
            )
            _put(grad_query, step, of_query)
            grad_keys.take(step, of_key)
            grad_values.take(step, of_value)
        return grad_query, grad_keys.grad_GTD, grad_values.grad_GTD, None, None


def _rows(values_GTRD: Tensor, step: Step) -> Tensor:
    """A step's queries, the heads of a group as rows: [1, G, C * R, D]."""
    return values_GTRD[:, step.start : step.stop].flatten(1, 2)[None]


def _put(values_GTRD: Tensor, step: Step, rows: Tensor) -> None:
    """The reverse of `_rows`."""
    place = values_GTRD[:, step.start : step.stop]
    place.copy_(rows.view(place.shape))


class _Stack:
    """Keys, or values, in the order that a step's call wants them."""

    def __init__(self, values_GTD: Tensor, plan: _Plan) -> None:
        self.values_GTD = values_GTD
        groups, _, width = values_GTD.shape
        self.stack = values_GTD.new_empty(1, groups, plan.height, width)

    def push(self, step: Step) -> Tensor:
        """Go on from the step before; gives [1, G, K, D]."""
        return self._write(step, step.pushes)

    def go_back(self, step: Step) -> Tensor:
        """Come from the step behind; gives [1, G, K, D]."""
        return self._write(step, step.returns)

    def _write(self, step: Step, writes: tuple[tuple[int, int, int], ...]) -> Tensor:
        for height, start, stop in writes:
            self.stack[0, :, height : height + stop - start] = self.values_GTD[:, start:stop]
        return self.stack[:, :, : step.num_keys]


class _GradStack:
    """Gradients of keys, or of values, summed over the steps from the last to the first."""

    def __init__(self, values_GTD: Tensor, plan: _Plan) -> None:
        groups, _, width = values_GTD.shape
        self.grad_GTD = torch.zeros_like(values_GTD)
        precise = torch.promote_types(values_GTD.dtype, torch.float32)
        self.sums = values_GTD.new_zeros(groups, plan.height, width, dtype=precise)
        self.after: Step | None = None

    def take(self, step: Step, grad: Tensor) -> None:
        """Add a step's [1, G, K, D]; the steps come in reverse."""
        if self.after is not None:
            for height, start, stop in self.after.pushes:
                self._give(height, start, min(stop, self.after.start))
        self.sums[:, : step.num_keys] += grad[0]
        self._give(step.num_path, step.start, step.stop)
        self.after = step

    def _give(self, height: int, start: int, stop: int) -> None:
        """Move sums off the stack, of tokens that no earlier step sees or that lie elsewhere in its stack."""
        if start < stop:
            sums = self.sums[:, height : height + stop - start]
            self.grad_GTD[:, start:stop] += sums
            sums.zero_()


class _Masks:
    """Additive masks of the steps: one workspace, whose left part is zero and stays so."""

    def __init__(self, query_GTRD: Tensor, plan: _Plan) -> None:
        _, _, self.repeats, _ = query_GTRD.shape
        self.masks, self.left = plan.masks, plan.height
        most = max((step.num_own for step in plan.steps), default=0)
        widest = max((step.num_mixed + step.num_own for step in plan.steps), default=0)
        self.space = query_GTRD.new_zeros(most, self.repeats, self.left + widest)
        self.written: Tensor | None = None

    def of(self, step: Step) -> Tensor:
        """[C * R, K]."""
        mask = self.masks[step.start]
        num_queries, num_top = mask.shape
        top = self.space[:num_queries, :, self.left : self.left + num_top]
        if mask is not self.written:
            top.copy_(mask[:, None])
            self.written = mask
        bottom = self.left - (step.num_keys - num_top)
        return self.space[:num_queries, :, bottom : self.left + num_top].flatten(0, 1)
