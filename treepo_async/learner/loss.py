"""The clipped policy loss of a token that several trajectories share.

Neighbours: `pack` sums the advantages, `correction` weighs the tokens, `step` adds up and divides by the trajectory
tokens of the whole batch. Pure torch.

Invariant: the sum over unique tokens equals the textbook loss summed over every trajectory, clipping included,
because the clipped surrogate is linear in the advantage on either side of zero.
"""

import torch
from torch import Tensor


def token_loss(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    correction_weight: Tensor,
    positive: Tensor,
    negative: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Loss of each token, summed over the trajectories through it.

    PPO's clipped surrogate (Schulman et al., 2017, equation 7; asymmetric range as in DAPO, 2025, equation 10) of one
    advantage A is `A * min(r, 1 + clip_high)` for A >= 0 and `A * max(r, 1 - clip_low)` for A < 0. Summed over
    the advantages of the leaves below a token, with P = sum of max(A, 0) and N = sum of max(-A, 0):

        loss = -w * (P * min(r, 1 + clip_high) - N * max(r, 1 - clip_low)),    r = exp(logprobs - proximal_logprobs)

    Args:
        logprobs: [E], of the policy being trained; the only argument a gradient flows to.
        proximal_logprobs: [E], the centre of the clip range.
        correction_weight: [E], w.
        positive: [E], P.
        negative: [E], N.
        clip_low: distance of the lower bound from 1.
        clip_high: distance of the upper bound from 1.

    Returns:
        Loss `[E]`, not yet divided by anything.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(logprobs, proximal_logprobs, correction_weight, positive, negative)
    ratio = torch.exp(logprobs - proximal_logprobs.detach())
    gain = positive * ratio.clamp(max=1 + clip_high) - negative * ratio.clamp(min=1 - clip_low)
    return -correction_weight.detach() * gain


def clipped(
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    positive: Tensor,
    negative: Tensor,
    clip_low: float,
    clip_high: float,
) -> Tensor:
    """Whether the clip takes a token's gradient away from at least one of its trajectories, bool `[E]`.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(logprobs, proximal_logprobs, positive, negative)
    ratio = torch.exp(logprobs - proximal_logprobs)
    above = (ratio > 1 + clip_high) & (positive > 0)
    below = (ratio < 1 - clip_low) & (negative > 0)
    return above | below


def _check_shapes(*values: Tensor) -> None:
    shapes = {tuple(value.shape) for value in values}
    if len(shapes) != 1 or values[0].dim() != 1:
        raise ValueError(f"every argument must have one shape [E], found {sorted(shapes)}")
