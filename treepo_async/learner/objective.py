"""From the logits of a microbatch to its loss and the numbers a step reports.

Neighbours: `step` runs it on the last pipeline stage; `loss`, `correction` and `logprobs` hold the formulas.

Invariant: everything it returns is a sum over tokens, so microbatches and ranks add up, and one division by the
batch's trajectory tokens at the end makes a mean per trajectory token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from treepo_async.learner.bounds import Bounds
from treepo_async.learner.correction import find_correction
from treepo_async.learner.edges import Edges
from treepo_async.learner.loss import clipped, token_loss

SUMS = (
    "loss", "weight", "capped", "clipped", "kl_behavior", "entropy",
    "trajectory_tokens", "gap", "compared", "trained_tokens", "microbatches",
)  # fmt: skip
"""What `Objective` sums, in the order of its vector. Up to the trajectory tokens, a token weighs as much as it has
trajectories; a microbatch without trained tokens does not count as one."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The clip range and the off-policy correction."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    correction: str = "truncated"
    """A name in `correction.CORRECTIONS`."""
    correction_cap: float = 2.0
    """Largest correction weight."""


class Objective:
    """The loss of `LossSettings` over the trained tokens of one microbatch.

    Raises:
        ConfigError: the correction is unknown.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.clip_low = settings.clip_low
        self.clip_high = settings.clip_high
        self.correct = find_correction(settings.correction)
        self.cap = settings.correction_cap

    def __call__(
        self, edges: Edges, logprobs: Tensor, entropy: Tensor, bounds: Bounds
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and statistics of a microbatch.

        Args:
            edges: its trained tokens.
            logprobs: [E], of the policy being trained, with a gradient.
            entropy: [E], of the distributions the tokens were drawn from, in nats.
            bounds: of the whole batch.

        Returns:
            The loss summed over the tokens, `[]`, with a gradient; the sums named by `SUMS`, float64 `[S]`; and the
            largest gap between learner and behavior log-prob of a fresh token, float64 `[]`.
        """
        proximal = edges.proximal_logprobs
        if proximal is None:
            proximal = logprobs.detach()
        weight = self.correct(proximal, edges.behavior_logprobs, self.cap)
        loss = token_loss(
            logprobs,
            proximal,
            weight,
            edges.positive,
            edges.negative,
            self.clip_low,
            self.clip_high,
        ).sum()
        with torch.no_grad():
            is_clipped = clipped(
                logprobs,
                proximal,
                edges.positive,
                edges.negative,
                self.clip_low,
                self.clip_high,
            )
            log_ratio = logprobs - edges.behavior_logprobs
            weighted = (
                weight,
                weight >= self.cap,
                is_clipped,
                _k3(log_ratio),
                entropy,
            )
            gap = torch.where(edges.is_fresh, log_ratio.abs(), 0.0)
            sums = [loss, *((edges.count * values).sum() for values in weighted)]
            num_trained = edges.count.new_tensor(len(edges.count))
            sums += [edges.count.double().sum(), gap.sum(), edges.is_fresh.sum()]
            sums += [num_trained, (num_trained > 0).float()]
            gap_max = torch.cat([gap.new_zeros(1), gap]).max()
        return loss, torch.stack([value.double() for value in sums]), gap_max.double()


def _k3(log_ratio: Tensor) -> Tensor:
    """KL(behavior || learner) of each token, r - 1 - log r; Schulman, "Approximating KL divergence", 2020."""
    return torch.expm1(log_ratio) - log_ratio
