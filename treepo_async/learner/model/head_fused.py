"""`head.token_logprobs` for CUDA: each pass over the logits is one compiled kernel, and nothing of their size is kept in float32.

Written out in single operations, as `head` does, log-probs and entropies of [E, V] logits read and write float32 copies of them a dozen times:
30 % of a pass of a model of 0.5B. Here forward reads the logits twice and backward once. Neighbour: `head` calls it where the logits are on CUDA.

Invariant: the same function as `head`'s own, and the same gradient, to rounding; float64 logits are worked on in float64, all others in float32.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async.learner.attention.compiled import compiled
from treepo_async.learner.mcore import parallel_state

MOST_COMPILATIONS = 32
"""Of each kernel: two precisions, sizes of the vocabulary, one number of rows and numbers of rows in general."""


class Kernels(NamedTuple):
    """What reads or writes [E, V]."""

    peak: Callable[..., Tensor]
    sums: Callable[..., tuple[Tensor, Tensor]]
    gradient: Callable[..., Tensor]


def peak(logits_EV: Tensor) -> Tensor:
    """The largest logit of each row."""
    return logits_EV.amax(dim=-1)


def sums(logits_EV: Tensor, temperature_E: Tensor, peak_E: Tensor) -> tuple[Tensor, Tensor]:
    """With y = logits / temperature - peak: the sums of exp(y) and of y exp(y) over each row."""
    shifted = logits_EV.to(peak_E.dtype) / temperature_E[:, None] - peak_E[:, None]
    weight = shifted.exp()
    return weight.sum(-1), (weight * shifted).sum(-1)


def gradient(
    logits_EV: Tensor,
    temperature_E: Tensor,
    shift_E: Tensor,
    place_E: Tensor,
    of_logprob_E: Tensor,
    of_entropy_E: Tensor | None,
    entropy_E: Tensor,
) -> Tensor:
    """The gradient of the logits; see `head` for the formulas.

    Args:
        logits_EV: of any dtype, the gradient's too.
        temperature_E: they are divided by.
        shift_E: logits / temperature - shift is the log-prob.
        place_E: the label's column; -1 where another rank has it.
        of_logprob_E: gradient of the label's log-prob.
        of_entropy_E: gradient of the entropy; None: it is taken for zero.
        entropy_E: in nats.
    """
    logprobs = logits_EV.to(shift_E.dtype) / temperature_E[:, None] - shift_E[:, None]
    factor = -of_logprob_E[:, None]
    if of_entropy_E is not None:
        factor = factor - of_entropy_E[:, None] * (logprobs + entropy_E[:, None])
    columns = torch.arange(logits_EV.shape[1], device=logits_EV.device)
    at_label = torch.where(columns[None] == place_E[:, None], of_logprob_E[:, None], 0.0)
    return ((logprobs.exp() * factor + at_label) / temperature_E[:, None]).to(logits_EV.dtype)


PLAIN = Kernels(peak, sums, gradient)
"""Not compiled, for a machine without a compiler: exact and slow."""


@cache
def compiled_kernels() -> Kernels:
    """Those for CUDA."""
    return Kernels(*(compiled(kernel, most=MOST_COMPILATIONS) for kernel in PLAIN))


class FusedTokenLogprobs(torch.autograd.Function):
    """`head.token_logprobs` with `Kernels`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: Tensor,
        with_entropy_gradient: bool,
        kernels: Kernels,
    ) -> Tensor:
        """[2, E], log-probs then entropies."""
        group = parallel_state.get_tensor_model_parallel_group()
        wide = torch.promote_types(logits.dtype, torch.float32)
        temperature = temperature.to(wide)
        peak_E = kernels.peak(logits).to(wide) / temperature
        dist.all_reduce(peak_E, op=dist.ReduceOp.MAX, group=group)
        total, moment = kernels.sums(logits, temperature, peak_E)
        place = places(labels, logits.shape[-1], group.rank())
        sums_3E = torch.stack([total, moment, chosen_share(logits, temperature, peak_E, place)])
        dist.all_reduce(sums_3E, group=group)
        total, moment, chosen = sums_3E
        entropy = total.log() - moment / total
        ctx.save_for_backward(logits, temperature, peak_E + total.log(), place, entropy)
        ctx.with_entropy_gradient, ctx.kernels = with_entropy_gradient, kernels
        return torch.stack([chosen - total.log(), entropy])

    @staticmethod
    def backward(ctx: Any, grad_2E: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The gradient of the logits."""
        logits, temperature, shift, place, entropy = ctx.saved_tensors
        of_entropy = grad_2E[1].contiguous() if ctx.with_entropy_gradient else None
        found = ctx.kernels.gradient(
            logits, temperature, shift, place, grad_2E[0].contiguous(), of_entropy, entropy
        )
        return found, None, None, None, None


def places(labels: Tensor, num_own: int, rank: int) -> Tensor:
    """[E], column of a label on this rank, -1 where another has it."""
    place = labels - rank * num_own
    return torch.where((place >= 0) & (place < num_own), place, -1)


def chosen_share(
    logits_EV: Tensor, temperature_E: Tensor, peak_E: Tensor, place_E: Tensor
) -> Tensor:
    """[E], logit / temperature - peak at the label, 0 where another rank has it."""
    logit_E = logits_EV.gather(1, place_E.clamp_min(0)[:, None])[:, 0].to(peak_E.dtype)
    return torch.where(place_E >= 0, logit_E / temperature_E - peak_E, 0.0)
