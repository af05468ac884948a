"""Off-policy corrections: what a token sampled under other weights or another kernel counts for.

A correction maps the log-ratio d = proximal - behavior of a token to a detached weight on its policy loss:

    none        1
    truncated   min(exp d, cap)                            Ionides 2008; per token as IMPALA's rho-bar (Espeholt et al. 2018)
    icepop      exp d where floor <= exp d <= cap, else 0  IcePop (Ring-1T, 2025)
    importance  exp d                                      decoupled PPO (Hilton et al. 2022) with ppo's clip

Neighbours: `proximal` makes d, exactly 0 for fresh tokens, `objective` multiplies. Pure torch.

Invariant: no gradient flows through a weight, and with floor <= 1 <= cap a log-ratio of 0 has a weight of exactly 1.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """Of the trained tokens."""

    weight: Tensor
    """[E]"""
    capped: Tensor
    """bool [E], whether it is not the ratio itself because of a bound."""


Correction = Callable[[Tensor, float, float], Weights]
"""(log-ratio [E], floor, cap) -> weights."""


def none(log_ratio: Tensor, floor: float, cap: float) -> Weights:
    """Every token counts for 1, whatever the policy that sampled it."""
    return Weights(torch.ones_like(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool))


def truncated(log_ratio: Tensor, floor: float, cap: float) -> Weights:
    """Truncated importance sampling; only the cap is read."""
    ratio = log_ratio.exp()
    return Weights(ratio.clamp(max=cap), ratio > cap)


def icepop(log_ratio: Tensor, floor: float, cap: float) -> Weights:
    """The ratio inside of its range, nothing outside."""
    ratio = log_ratio.exp()
    outside = (ratio < floor) | (ratio > cap)
    return Weights(torch.where(outside, 0.0, ratio), outside)


def importance(log_ratio: Tensor, floor: float, cap: float) -> Weights:
    """The ratio without a bound."""
    return Weights(log_ratio.exp(), torch.zeros_like(log_ratio, dtype=torch.bool))


CORRECTIONS: Mapping[str, Correction] = MappingProxyType(
    {"none": none, "truncated": truncated, "icepop": icepop, "importance": importance}
)
