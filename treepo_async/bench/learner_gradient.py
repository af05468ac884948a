"""Whether two ways of training leave the same gradient, tensor by tensor. Neighbour: `learner_run` trains.

Gradients are the sums of all microbatches that Megatron leaves in `main_grad`. One copy of them is kept, on the CPU.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Gradients = Mapping[str, Tensor]
"""By name of the parameter, on the CPU."""
SMALL = 1e-3
"""A tensor's gradient that is smaller than this share of the whole one counts as of that size: rounding is not judged."""


def copied(model: Any) -> Gradients:
    """The gradients that the last pass left."""
    return {name: weight.main_grad.cpu().clone() for name, weight in model.named_parameters()}


def norm(model: Any) -> float:
    """Of the whole gradient."""
    squares = [weight.main_grad.double().square().sum() for weight in model.parameters()]
    return math.sqrt(float(torch.stack(squares).sum()))


def worst_gap(model: Any, expected: Gradients) -> tuple[float, str]:
    """The largest ||found - expected|| / ||expected|| of a tensor, and the tensor's name.

    Args:
        model: with the gradients that were found.
        expected: from `copied`.
    """
    least = SMALL * math.sqrt(sum(_norm(gradient) ** 2 for gradient in expected.values()))
    gaps = []
    for name, weight in model.named_parameters():
        wanted = expected[name].to(weight.main_grad.device)
        gap = _norm(weight.main_grad - wanted) / max(_norm(wanted), least)
        # NaN is above every limit
        gaps.append((math.inf if math.isnan(gap) else gap, name))
    return max(gaps)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
