"""From the log-probs of a microbatch to its loss and the numbers a step reports.

    loss = policy loss + kl_coef * sum of W * divergence(theta, reference) - entropy_coef * sum of W * entropy

The weights of correction and mask act on the policy loss alone; W is the weight of all trajectories through a token.

Neighbours: `step` runs it on the last pipeline stage; `proximal`, `correction`, `mask` and `loss` hold the formulas, `statistics` the
numbers beside the loss.

Invariant: everything it returns is a sum over tokens, with the normalizer in their weights, so microbatches and ranks add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from treepo_async.errors import ConfigError
from treepo_async.learner.loss.correction import CORRECTIONS
from treepo_async.learner.loss.mask import MASKS, MaskRules, kept
from treepo_async.learner.loss.policy import LOSSES, Clip, divergence, k3
from treepo_async.learner.loss.proximal import behavior_logprobs, proximal_logprobs
from treepo_async.learner.loss.statistics import SUMS, TokenStatistics, sums_of
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.edges import Edges

__all__ = ["SUMS", "LossSettings", "Objective"]


@dataclass(frozen=True, slots=True)
class LossSettings:
    """What is minimised; the names are those of `config.schema.LearnerConfig`."""

    loss: str = "ppo"
    anchor: str = "proximal"
    """Policy the ratio is taken against: proximal or behavior; `dppo` has the behavior policy always."""
    proximal: str = "auto"
    """Centre of the clip range: see `proximal.proximal_logprobs`."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = None
    tv_clip: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    correction: str = "truncated"
    correction_cap: float = 2.0
    correction_floor: float = 0.5
    correct_fresh: bool = False
    """Whether fresh tokens are corrected and masked like others."""
    mask: MaskRules = field(default_factory=MaskRules)


class Objective:
    """The loss of `LossSettings` over the trained tokens of one microbatch.

    Raises:
        ConfigError: a loss, a correction or a mask is unknown.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self.policy_loss = _find("loss", settings.loss, LOSSES)
        self.correct = _find("correction", settings.correction, CORRECTIONS)
        for name in settings.mask.names:
            _find("mask", name, MASKS)
        self.clip = Clip(
            settings.clip_low, settings.clip_high, settings.dual_clip, settings.tv_clip
        )

    def __call__(
        self, edges: Edges, logprobs: Tensor, entropy: Tensor, bounds: Bounds
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and statistics of a microbatch.

        Args:
            edges: its trained tokens.
            logprobs: [E], of the policy being trained, with a gradient.
            entropy: [E], of the distributions the tokens were drawn from, in nats; with a gradient where it is lifted.
            bounds: of the whole batch.

        Returns:
            The loss summed over the tokens, `[]`, with a gradient; the sums named by `SUMS`, float64 `[S]`; and the
            largest gap between learner and behavior log-prob of a fresh token, float64 `[]`.

        Raises:
            ValueError: log-probs that the settings need were not computed.
        """
        settings = self.settings
        proximal = proximal_logprobs(settings.proximal, edges, logprobs)
        behavior = behavior_logprobs(edges, proximal, correct_fresh=settings.correct_fresh)
        log_ratio = proximal - behavior
        correction, capped = self.correct(
            log_ratio, settings.correction_floor, settings.correction_cap
        )
        is_kept = kept(edges, log_ratio, settings.mask, bounds)
        # where, not times: a weight of a masked token may be infinite
        weight = torch.where(is_kept, correction, 0.0)
        anchored = settings.anchor == "behavior" or settings.loss == "dppo"
        policy = self.policy_loss(
            edges, logprobs, behavior if anchored else proximal, weight, self.clip
        )
        loss = policy.loss + self._regularizers(edges, logprobs, entropy)
        with torch.no_grad():
            tokens = TokenStatistics(
                weight=weight,
                kl_behavior=k3(logprobs - edges.behavior_logprobs),
                clipped=policy.clipped,
                masked=(~is_kept).to(weight.dtype),
                capped=capped.to(weight.dtype),
                entropy=entropy,
                kl_reference=_k3_to_reference(edges, logprobs),
                gap=(_at_start(edges, logprobs) - edges.behavior_logprobs).abs(),
            )
            sums, gap_max = sums_of(edges, loss, policy.loss, tokens)
        return loss, sums, gap_max

    def _regularizers(self, edges: Edges, logprobs: Tensor, entropy: Tensor) -> Tensor | float:
        settings, total = self.settings, 0.0
        if settings.kl_coef > 0:
            if edges.reference_logprobs is None:
                raise ValueError("kl_coef above 0 needs the log-probs of the reference policy")
            kl = divergence(logprobs, edges.reference_logprobs, settings.kl_estimator)
            total = total + settings.kl_coef * (edges.weight * kl).sum()
        if settings.entropy_coef > 0:
            total = total - settings.entropy_coef * (edges.weight * entropy).sum()
        return total


def _at_start(edges: Edges, logprobs: Tensor) -> Tensor:
    """Log-probs under the version trained from: those of this pass unless an earlier one of the batch is known."""
    return logprobs if edges.proximal_logprobs is None else edges.proximal_logprobs


def _k3_to_reference(edges: Edges, logprobs: Tensor) -> Tensor | None:
    if edges.reference_logprobs is None:
        return None
    return k3(edges.reference_logprobs - logprobs)


def _find(what: str, name: str, table: Mapping[str, Any]) -> Any:
    """Look a function up; an unknown name is refused with the nearest."""
    if name in table:
        return table[name]
    near = get_close_matches(name, table, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{what} {name!r} is unknown{hint}; there are: {', '.join(table)}")
