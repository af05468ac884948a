"""Log-probs and entropies of tokens, from logits whose vocabulary is split over tensor-parallel ranks.

Neighbours: `packed` calls it on the last pipeline stage, a chunk of tokens at a time; `head_fused` computes the same on CUDA. Axis
letters: `E` tokens, `V` this rank's share of the vocabulary.

Invariant: float64 logits are worked on in float64, all others in float32.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async.learner.mcore import parallel_state
from treepo_async.learner.model.head_fused import FusedTokenLogprobs, compiled_kernels


def token_logprobs(
    logits_EV: Tensor,
    labels_E: Tensor,
    temperature_E: Tensor,
    *,
    with_entropy_gradient: bool = False,
) -> Tensor:
    """Log-prob of each label and entropy in nats of the distribution it is drawn from; the same on all ranks.

    Args:
        logits_EV: [E, V]; they are not changed.
        labels_E: int64 [E], ids in the whole vocabulary.
        temperature_E: [E], the logits are divided by it.
        with_entropy_gradient: without, the gradient of the entropies is taken for zero, which is cheaper.

    Returns:
        [2, E], log-probs then entropies.
    """
    arguments = (logits_EV, labels_E, temperature_E, with_entropy_gradient)
    if logits_EV.is_cuda:
        return FusedTokenLogprobs.apply(*arguments, compiled_kernels())
    return _TokenLogprobs.apply(*arguments)


class _TokenLogprobs(torch.autograd.Function):
    """With p the softmax of x / temperature over the whole vocabulary and H its entropy.

    d log p[label] / dx = (onehot - p) / temperature; dH / dx = -p (log p + H) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, temperature: Tensor, with_entropy_gradient: bool
    ) -> Tensor:
        group = parallel_state.get_tensor_model_parallel_group()
        wide = torch.promote_types(logits.dtype, torch.float32)
        temperature = temperature.to(wide)[:, None]
        shifted_EV = logits.to(wide) / temperature
        peak_E = shifted_EV.amax(dim=-1)
        dist.all_reduce(peak_E, op=dist.ReduceOp.MAX, group=group)
        shifted_EV -= peak_E[:, None]
        place, is_mine = _places(labels, logits.shape[-1], group.rank())
        chosen = torch.where(is_mine, shifted_EV.gather(1, place), 0.0)[:, 0]
        weight_EV = shifted_EV.exp()
        total, moment = weight_EV.sum(-1), weight_EV.mul_(shifted_EV).sum(-1)
        sums_3E = torch.stack([total, moment, chosen])
        dist.all_reduce(sums_3E, group=group)
        total, moment, chosen = sums_3E
        entropy = total.log() - moment / total
        logprobs_EV = shifted_EV.sub_(total.log()[:, None])
        ctx.save_for_backward(logprobs_EV, place, is_mine, temperature, entropy)
        ctx.with_entropy_gradient, ctx.dtype = with_entropy_gradient, logits.dtype
        return torch.stack([chosen - total.log(), entropy])

    @staticmethod
    def backward(ctx: Any, grad_2E: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logprobs_EV, place, is_mine, temperature, entropy = ctx.saved_tensors
        of_logprob, of_entropy = grad_2E[0][:, None], grad_2E[1][:, None]
        factor = -of_logprob
        if ctx.with_entropy_gradient:
            factor = factor - of_entropy * (logprobs_EV + entropy[:, None])
        grad_EV = logprobs_EV.exp().mul_(factor)
        grad_EV.scatter_add_(1, place, torch.where(is_mine, of_logprob, 0.0))
        return grad_EV.div_(temperature).to(ctx.dtype), None, None, None


def _places(labels: Tensor, num_own: int, rank: int) -> tuple[Tensor, Tensor]:
    """[E, 1] each: column of a label on this rank, and whether it is there; if not, the column is any."""
    place = labels[:, None] - rank * num_own
    is_mine = (place >= 0) & (place < num_own)
    return torch.where(is_mine, place, 0), is_mine
