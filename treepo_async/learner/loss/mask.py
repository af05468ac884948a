"""Rules that leave tokens out of the policy loss because the policy that sampled them is too far off.

Each maps the log-ratios d = proximal - behavior to the tokens that are kept; several rules multiply. A segment is a slot: the tokens of
one grid level sampled under one version, n of them, all of one lag.

    geometric      keep a segment iff |mean d| <= sigmas * std / sqrt(n) + per_lag * lag
    window         keep a segment iff low <= exp(mean d) <= high         geometric MIS
    k3             keep a segment iff mean(exp d - 1 - d) <= k3
    veto_token     leave out tokens with exp d < veto
    veto_segment   leave out segments with such a token
    veto_subtree   leave out segments with such a token and all that continues them
    m2po           leave out tokens with d^2 > the bound of the batch    M2PO (2025)

`std` and the bound of `m2po` are `bounds` of the whole batch; without them (no stale token) nothing is masked. Tokens of no known
lag get no allowance for it.

Masked tokens leave the policy loss only. The normalizer, the divergence to the reference and the entropy keep them, so that a mask
never makes the other tokens count for more.

Invariant: log-ratios of 0 are kept by every rule, as `config.validate` holds low <= 1 <= high and veto < 1; and what becomes of a
token does not depend on the piece it is in, as segments and the path above them are whole in each.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from treepo_async.learner.loss.policy import k3
from treepo_async.learner.loss.slots import slot_lengths, slot_means, slot_sums, slot_values
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.edges import Edges
from treepo_async.types import ROOT


@dataclass(frozen=True, slots=True)
class MaskRules:
    """Which rules, and their numbers."""

    names: tuple[str, ...] = ()
    """In `MASKS`."""
    sigmas: float = 3.0
    per_lag: float = 0.02
    """In nats."""
    low: float = 0.8
    high: float = 1.2
    k3: float = 0.01
    """In nats."""
    veto: float = 1e-4


Mask = Callable[[Edges, Tensor, MaskRules, Bounds], Tensor]
"""(edges, log-ratio [E], rules, bounds) -> kept, bool [E]."""


def kept(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    """Whether all of the rules keep each token, bool [E]."""
    found = torch.ones_like(log_ratio, dtype=torch.bool)
    for name in rules.names:
        found = found & MASKS[name](edges, log_ratio, rules, bounds)
    return found


def _geometric(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    length_M = slot_lengths(edges).to(log_ratio.dtype)
    lag_M = slot_values(edges, edges.lag).clamp(min=0)
    allowed_M = rules.sigmas * bounds.log_ratio_std / length_M.sqrt() + rules.per_lag * lag_M
    # not <=: a bound of NaN masks nothing
    return ~(slot_means(edges, log_ratio).abs() > allowed_M)[edges.slot]


def _window(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    ratio_M = slot_means(edges, log_ratio).exp()
    return ((ratio_M >= rules.low) & (ratio_M <= rules.high))[edges.slot]


def _k3(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    return (slot_means(edges, k3(log_ratio)) <= rules.k3)[edges.slot]


def _veto_token(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    return log_ratio.exp() >= rules.veto


def _veto_segment(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    return ~_vetoed_M(edges, log_ratio, rules)[edges.slot]


def _veto_subtree(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    vetoed = torch.cat([_vetoed_M(edges, log_ratio, rules), edges.slot.new_zeros(1).bool()])
    root = edges.num_slots  # the prompt, as one slot more
    above = torch.cat([edges.slot_parent, edges.slot_parent.new_tensor([root])])
    above = torch.where(above == ROOT, root, above)
    for _ in range(root.bit_length()):  # each round looks twice as far up
        vetoed, above = vetoed | vetoed[above], above[above]
    return ~vetoed[edges.slot]


def _m2po(edges: Edges, log_ratio: Tensor, rules: MaskRules, bounds: Bounds) -> Tensor:
    return log_ratio**2 <= bounds.largest_square


def _vetoed_M(edges: Edges, log_ratio: Tensor, rules: MaskRules) -> Tensor:
    """Whether a slot has a token that is vetoed, bool [M]."""
    low_E = ~_veto_token(edges, log_ratio, rules, Bounds())
    return slot_sums(edges, low_E.long()) > 0


MASKS: Mapping[str, Mask] = MappingProxyType(
    {
        "geometric": _geometric,
        "window": _window,
        "k3": _k3,
        "veto_token": _veto_token,
        "veto_segment": _veto_segment,
        "veto_subtree": _veto_subtree,
        "m2po": _m2po,
    }
)
