"""Log-probs and entropy of the trained tokens, from logits whose vocabulary is split over tensor-parallel ranks.

Neighbours: `step` calls it on the last pipeline stage. Axis letters: `T` packed tokens, `E` trained tokens, `V` this
rank's share of the vocabulary.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async.learner.mcore import parallel_state, vocab_parallel_cross_entropy


def predicting_logits(logits_TV: Tensor, prev_E: Tensor, temperature_E: Tensor) -> Tensor:
    """The logits that predict each trained token, at its sampling temperature, float32 `[E, V]`.

    A row whose token branches appears once per child.
    """
    return logits_TV.index_select(0, prev_E).float() / temperature_E[:, None]


def token_logprobs(logits_EV: Tensor, labels_E: Tensor) -> Tensor:
    """Log-prob of each label under its row of logits, `[E]`; differentiable.

    Megatron's cross entropy subtracts the maximum in place, so the logits are copied.
    """
    return -vocab_parallel_cross_entropy(logits_EV.clone()[:, None], labels_E[:, None])[:, 0]


@torch.no_grad()
def token_entropy(logits_EV: Tensor) -> Tensor:
    """Entropy in nats of the distribution each trained token was drawn from, `[E]`."""
    group = parallel_state.get_tensor_model_parallel_group()
    peak_E = logits_EV.max(dim=-1).values
    dist.all_reduce(peak_E, op=dist.ReduceOp.MAX, group=group)
    shifted_EV = logits_EV - peak_E[:, None]
    weight_EV = shifted_EV.exp()
    sums_2E = torch.stack([weight_EV.sum(-1), (weight_EV * shifted_EV).sum(-1)])
    dist.all_reduce(sums_2E, group=group)
    return sums_2E[0].log() - sums_2E[1] / sums_2E[0]
