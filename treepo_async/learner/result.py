"""What one update did, from the sums over its tokens.

Neighbours: `objective` sums, `step` adds up over microbatches and ranks, the worker reports. Pure Python.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did. Means and shares are per trajectory token: a token counts once per leaf below it."""

    loss: float
    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    num_trained_tokens: int
    """Each token once per piece it is in."""
    num_trajectory_tokens: int
    num_microbatches: int
    """With trained tokens, over all data-parallel replicas."""
    correction_weight_mean: float
    correction_capped_share: float
    clipped_share: float
    kl_behavior: float
    """KL(behavior || learner), k3 estimate in nats."""
    entropy: float
    """In nats, at the sampling temperature."""
    logprob_gap_mean: float
    """Mean |learner - behavior| log-prob over unique tokens sampled under the version trained from with a KV cache of
    one version; NaN where there is none."""
    logprob_gap_max: float
    skipped: bool
    """Whether the weights were left as they were, because the loss or the gradient norm was not finite."""


def result_of(
    sums: Mapping[str, float],
    gap_max: float,
    *,
    grad_norm: float,
    learning_rate: float,
    skipped: bool,
) -> StepResult:
    """Means of what was summed.

    Args:
        sums: by the names in `objective.SUMS`, over all ranks.
        gap_max: largest gap, over all ranks.
        grad_norm: before clipping.
        learning_rate: of the update.
        skipped: whether there was none.
    """
    tokens, compared = sums["trajectory_tokens"], sums["compared"]

    def mean(name: str) -> float:
        return sums[name] / tokens if tokens else math.nan

    return StepResult(
        loss=loss_of(sums),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_trained_tokens=int(sums["trained_tokens"]),
        num_trajectory_tokens=int(tokens),
        num_microbatches=int(sums["microbatches"]),
        correction_weight_mean=mean("weight"),
        correction_capped_share=mean("capped"),
        clipped_share=mean("clipped"),
        kl_behavior=mean("kl_behavior"),
        entropy=mean("entropy"),
        logprob_gap_mean=sums["gap"] / compared if compared else math.nan,
        logprob_gap_max=gap_max if compared else math.nan,
        skipped=skipped,
    )


def loss_of(sums: Mapping[str, float]) -> float:
    """The loss of an update; NaN where nothing was trained."""
    return sums["loss"] if sums["trajectory_tokens"] else math.nan


def merge(results: Sequence[StepResult]) -> StepResult:
    """The updates of one batch as one: sums added, means weighted by tokens, the largest of what is a maximum."""
    last = results[-1]

    def total(name: str) -> int:
        return sum(map(attrgetter(name), results))

    def mean(name: str, weight: Callable[[StepResult], float]) -> float:
        known = [r for r in results if not math.isnan(getattr(r, name))]
        norm = sum(map(weight, known))
        return sum(weight(r) * getattr(r, name) for r in known) / norm if norm else math.nan

    by_token = {
        name: mean(name, attrgetter("num_trajectory_tokens"))
        for name in (
            "correction_weight_mean",
            "correction_capped_share",
            "clipped_share",
            "kl_behavior",
            "entropy",
            "logprob_gap_mean",
        )
    }
    gaps = [r.logprob_gap_max for r in results if not math.isnan(r.logprob_gap_max)]
    return replace(
        last,
        loss=sum(r.loss for r in results) / len(results),
        grad_norm=sum(r.grad_norm for r in results) / len(results),
        num_trained_tokens=total("num_trained_tokens"),
        num_trajectory_tokens=total("num_trajectory_tokens"),
        num_microbatches=total("num_microbatches"),
        logprob_gap_max=max(gaps, default=math.nan),
        skipped=any(r.skipped for r in results),
        **by_token,
    )
