"""The policy losses of a token that several trajectories share, and the two terms beside them.

Neighbours: `pack` sums advantages and weights over the trajectories through a token, `proximal` says what the ratio is taken
against, `correction` and `mask` weigh tokens, `objective` puts a loss together. Pure torch.

With A the advantage of a trajectory at a token and w its weight (the normalizer is in it), P = sum of w max(A, 0) over the
trajectories through the token, N = sum of w max(-A, 0), c the token's weight from correction and mask, and r = exp(theta - anchor):

    ppo        -c [P min(r, 1 + high) - N min(max(r, 1 - low), dual)]       Schulman et al. 2017, eq. 7; DAPO 2025, eq. 10
    cispo      -c (P - N) sg(clamp(r, 1 - low, 1 + high)) theta             MiniMax-M1 2025, eq. 4
    reinforce  -c (P - N) theta                                             Williams 1992
    dppo       -c [P 1(exp theta - exp mu <= tv) - N 1(exp mu - exp theta <= tv)] r     anchor always mu
    gspo       ppo's form, r = exp(mean of theta - anchor over the trajectory)          Zheng et al. 2025, eq. 5-7
    gspo_segment   the same over the tokens of the trajectory on one grid level

In the last two, c multiplies the terms of a trajectory token by token, so its P is the sum over its tokens of c w max(A, 0);
the ratio is the mean over all of its tokens, whatever c. A level's ratio is the same for all trajectories that share the level,
and does not change where a segment was cut in two at a version boundary.

Invariant: the sum over unique tokens equals the textbook loss summed over every trajectory, clipping included, because each form is
linear in the advantage on either side of zero. No gradient flows through the anchor or through c.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from treepo_async.learner.loss.slots import slot_lengths, slot_sums, slot_values, sum_by
from treepo_async.learner.packing.edges import Edges


@dataclass(frozen=True, slots=True)
class Clip:
    """Bounds of a ratio."""

    low: float = 0.2
    """Distance of the lower bound from 1; 1: none."""
    high: float = 0.28
    """Distance of the upper bound from 1."""
    dual: float | None = None
    """Upper bound where the advantage is negative."""
    tv: float = 0.2
    """Of `dppo`: largest change of a token's probability."""


LARGEST_LOG_RATIO = 20.0
"""In nats; ratios beyond it are held there, without a gradient."""


class Terms(NamedTuple):
    """A policy loss over the trained tokens of a microbatch."""

    loss: Tensor
    """[], with a gradient."""
    clipped: Tensor
    """[E], share of the trajectories through the token whose term the clip acts on; that of a token as a whole is 0 or 1."""


PolicyLoss = Callable[[Edges, Tensor, Tensor, Tensor, Clip], Terms]
"""(edges, theta [E], anchor [E], c [E], clip) -> terms."""


def ppo(edges: Edges, theta: Tensor, anchor: Tensor, weight: Tensor, clip: Clip) -> Terms:
    """The clipped surrogate with an asymmetric range and, where it is set, a dual clip."""
    ratio = _ratio(theta, anchor)
    gain = edges.positive * _upper(ratio, clip) - edges.negative * _lower(ratio, clip)
    return Terms(
        -(weight.detach() * gain).sum(),
        _is_clipped(ratio, edges.positive, edges.negative, clip).to(theta.dtype),
    )


def cispo(edges: Edges, theta: Tensor, anchor: Tensor, weight: Tensor, clip: Clip) -> Terms:
    """REINFORCE weighted by the clamped ratio; no token loses its gradient."""
    ratio = _ratio(theta, anchor).detach()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    gain = weight.detach() * (edges.positive - edges.negative) * bounded * theta
    return Terms(-gain.sum(), (bounded != ratio).to(theta.dtype))


def reinforce(edges: Edges, theta: Tensor, anchor: Tensor, weight: Tensor, clip: Clip) -> Terms:
    """The score function alone; neither anchor nor clip is read."""
    gain = weight.detach() * (edges.positive - edges.negative) * theta
    return Terms(-gain.sum(), torch.zeros_like(theta).detach())


def dppo(edges: Edges, theta: Tensor, anchor: Tensor, weight: Tensor, clip: Clip) -> Terms:
    """The ratio against the behavior policy, without the terms that would move a token's probability further than `clip.tv`."""
    moved = (theta.exp() - anchor.exp()).detach()
    above, below = moved > clip.tv, moved < -clip.tv
    positive = torch.where(above, 0.0, edges.positive)
    negative = torch.where(below, 0.0, edges.negative)
    gain = weight.detach() * (positive - negative) * _ratio(theta, anchor)
    is_clipped = (above & (edges.positive > 0)) | (below & (edges.negative > 0))
    return Terms(-gain.sum(), is_clipped.to(theta.dtype))


def gspo(edges: Edges, theta: Tensor, anchor: Tensor, weight: Tensor, clip: Clip) -> Terms:
    """The clipped surrogate with one ratio a trajectory."""
    return _by_unit(edges, theta - anchor.detach(), weight, clip, edges.path_trajectory)


def gspo_segment(edges: Edges, theta: Tensor, anchor: Tensor, weight: Tensor, clip: Clip) -> Terms:
    """The clipped surrogate with one ratio a trajectory and grid level."""
    num_levels = int(edges.level.max()) + 1 if len(edges.level) else 1
    level_K = slot_values(edges, edges.level)[edges.path_slot]
    unit_K = edges.path_trajectory * num_levels + level_K
    return _by_unit(edges, theta - anchor.detach(), weight, clip, unit_K)


LOSSES: Mapping[str, PolicyLoss] = MappingProxyType(
    {
        "ppo": ppo,
        "cispo": cispo,
        "gspo": gspo,
        "gspo_segment": gspo_segment,
        "reinforce": reinforce,
        "dppo": dppo,
    }
)


def divergence(theta: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """Estimate of KL(theta || reference) at each token, [E], differentiable; Schulman, "Approximating KL divergence", 2020.

    With d = reference - theta: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - 1 - d. As a term of a loss, k2 has the gradient of the
    divergence on tokens that theta sampled; k1 has one of mean 0 there, and k3 that of the reverse divergence.
    """
    d = reference - theta
    if estimator == "k1":
        return -d
    return 0.5 * d * d if estimator == "k2" else k3(d)


def k3(log_ratio: Tensor) -> Tensor:
    """The k3 estimate of a divergence, exp(log-ratio) - 1 - log-ratio."""
    return torch.expm1(log_ratio) - log_ratio


def _ratio(theta: Tensor, anchor: Tensor) -> Tensor:
    return _exp(theta - anchor.detach())


def _exp(log_ratio: Tensor) -> Tensor:
    """Without an infinity, which times the gradient 0 of what is clipped or masked would be NaN."""
    return torch.exp(log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO))


def _upper(ratio: Tensor, clip: Clip) -> Tensor:
    """Of a positive advantage."""
    return ratio.clamp(max=1 + clip.high)


def _lower(ratio: Tensor, clip: Clip) -> Tensor:
    """Of a negative advantage."""
    bounded = ratio.clamp(min=1 - clip.low)
    return bounded if clip.dual is None else bounded.clamp(max=clip.dual)


def _is_clipped(ratio: Tensor, positive: Tensor, negative: Tensor, clip: Clip) -> Tensor:
    """Whether the clip takes the gradient away from at least one of the advantages, bool."""
    below = ratio < 1 - clip.low
    if clip.dual is not None:
        below = below | (ratio > clip.dual)
    return ((ratio > 1 + clip.high) & (positive > 0)) | (below & (negative > 0))


def _by_unit(
    edges: Edges, log_ratio_E: Tensor, weight_E: Tensor, clip: Clip, unit_K: Tensor
) -> Terms:
    """The clipped surrogate whose ratio is the geometric mean over each unit.

    Args:
        edges: of the microbatch.
        log_ratio_E: [E], theta - anchor.
        weight_E: [E].
        clip: of the ratio.
        unit_K: int64 [K], the unit that each pair of a trajectory and a slot is in; the units of a trajectory are its own.
    """
    num_units = int(unit_K.max()) + 1 if len(unit_K) else 0

    def over_unit(values_K: Tensor) -> Tensor:
        return sum_by(unit_K, values_K, num_units)

    length_M = slot_lengths(edges).to(log_ratio_E.dtype)
    length_U = over_unit(length_M[edges.path_slot])
    total_U = over_unit(slot_sums(edges, log_ratio_E)[edges.path_slot])
    ratio_U = _exp(total_U / length_U.clamp(min=1))
    weight_K = slot_sums(edges, weight_E.detach())[edges.path_slot]
    positive_U = over_unit(weight_K * edges.path_positive)
    negative_U = over_unit(weight_K * edges.path_negative)
    gain_U = positive_U * _upper(ratio_U, clip) - negative_U * _lower(ratio_U, clip)
    is_clipped_U = _is_clipped(ratio_U, positive_U, negative_U, clip).to(log_ratio_E.dtype)
    clipped_M = sum_by(edges.path_slot, is_clipped_U[unit_K], edges.num_slots)
    return Terms(-gain_U.sum(), clipped_M[edges.slot] / edges.count)
