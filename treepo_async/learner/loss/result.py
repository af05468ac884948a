"""What one update did, from the sums over its tokens.

Neighbours: `statistics` names the sums, `step` adds up over microbatches and ranks, the worker reports. Pure Python.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from treepo_async.learner.loss.statistics import LAGS, LEVELS

Row = Mapping[str, float]
"""Of the tokens of one lag or level: `tokens`, and means over them: `ess` (see `StepResult`), `weight` of correction and mask,
`kl_behavior`, `clipped` and `masked` share."""

ROW_MEANS = ("weight", "kl_behavior", "clipped", "masked")


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
    """Of correction and mask together."""
    correction_capped_share: float
    """Tokens whose correction weight is bounded."""
    clipped_share: float
    kl_behavior: float
    """KL(behavior || learner), k3 estimate in nats."""
    entropy: float
    """In nats, at the sampling temperature."""
    logprob_gap_mean: float
    """Mean |learner - behavior| log-prob over fresh tokens, each once per piece it is in; NaN where there is none."""
    logprob_gap_max: float
    num_skipped: int
    """Updates left out, because the loss or the gradient norm was not finite."""
    num_updates: int = 1
    """Those included."""
    num_compared_tokens: int = 0
    """Fresh tokens, each once per piece it is in."""
    policy_loss: float = math.nan
    """The loss without its divergence and entropy."""
    masked_share: float = math.nan
    ess: float = math.nan
    """Effective sample size over the number of tokens, (sum w)^2 / (n * sum w^2), w the weight of correction and mask."""
    kl_reference: float = math.nan
    """KL(learner || reference), k3 estimate in nats; NaN without a reference."""
    by_lag: Mapping[str, Row] = field(default_factory=dict)
    """Tokens by the publications between sampling and training, those in `statistics.LAGS` that have any."""
    by_level: Mapping[str, Row] = field(default_factory=dict)
    """Tokens by grid level, those in `statistics.LEVELS` that have any."""


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
        sums: by the names in `statistics.SUMS`, over all ranks.
        gap_max: largest gap, over all ranks.
        grad_norm: before clipping.
        learning_rate: of the update.
        skipped: whether there was none.
    """
    tokens, compared = sums["trajectory_tokens"], sums["compared"]
    by_lag, by_level = _rows(sums, "lag", LAGS), _rows(sums, "level", LEVELS)
    whole = _merge_rows(list(by_lag.values()))
    return StepResult(
        loss=loss_of(sums),
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        num_trained_tokens=int(sums["trained_tokens"]),
        num_trajectory_tokens=int(tokens),
        num_microbatches=int(sums["microbatches"]),
        correction_weight_mean=whole["weight"],
        correction_capped_share=_ratio(sums["capped"], tokens),
        clipped_share=whole["clipped"],
        kl_behavior=whole["kl_behavior"],
        entropy=_ratio(sums["entropy"], tokens),
        logprob_gap_mean=_ratio(sums["gap"], compared),
        logprob_gap_max=gap_max if compared else math.nan,
        num_skipped=int(skipped),
        num_compared_tokens=int(compared),
        policy_loss=sums["policy_loss"] if tokens else math.nan,
        masked_share=whole["masked"],
        ess=whole["ess"],
        kl_reference=_ratio(sums["kl_reference"], sums["referenced"]),
        by_lag=by_lag,
        by_level=by_level,
    )


def loss_of(sums: Mapping[str, float]) -> float:
    """The loss of an update; NaN where nothing was trained."""
    return sums["loss"] if sums["trajectory_tokens"] else math.nan


def merge(results: Sequence[StepResult]) -> StepResult:
    """The updates of one batch as one.

    Counts are added, means weighted by their tokens, of gaps the largest is kept; loss and gradient norm are means over the
    updates where they are finite, the learning rate is the last one.
    """
    last = results[-1]

    def total(name: str) -> int:
        return sum(map(attrgetter(name), results))

    def mean(name: str, weight: Callable[[StepResult], float]) -> float:
        known = [r for r in results if math.isfinite(getattr(r, name))]
        norm = sum(map(weight, known))
        return sum(weight(r) * getattr(r, name) for r in known) / norm if norm else math.nan

    by_token = {
        name: mean(name, attrgetter("num_trajectory_tokens"))
        for name in (
            "correction_weight_mean",
            "correction_capped_share",
            "clipped_share",
            "masked_share",
            "kl_behavior",
            "kl_reference",
            "entropy",
        )
    }
    gaps = [r.logprob_gap_max for r in results if not math.isnan(r.logprob_gap_max)]
    by_lag = _merge_tables([r.by_lag for r in results], LAGS)
    return replace(
        last,
        loss=mean("loss", attrgetter("num_updates")),
        policy_loss=mean("policy_loss", attrgetter("num_updates")),
        grad_norm=mean("grad_norm", attrgetter("num_updates")),
        logprob_gap_mean=mean("logprob_gap_mean", attrgetter("num_compared_tokens")),
        num_updates=total("num_updates"),
        num_skipped=total("num_skipped"),
        num_compared_tokens=total("num_compared_tokens"),
        num_trained_tokens=total("num_trained_tokens"),
        num_trajectory_tokens=total("num_trajectory_tokens"),
        num_microbatches=total("num_microbatches"),
        logprob_gap_max=max(gaps, default=math.nan),
        ess=_merge_rows(list(by_lag.values()))["ess"],
        by_lag=by_lag,
        by_level=_merge_tables([r.by_level for r in results], LEVELS),
        **by_token,
    )


def _rows(sums: Mapping[str, float], axis: str, names: Sequence[str]) -> dict[str, Row]:
    """The rows that have tokens."""
    rows = {}
    for name in names:
        prefix = f"{axis}/{name}/"
        row = {key.removeprefix(prefix): v for key, v in sums.items() if key.startswith(prefix)}
        if row["tokens"] > 0:
            rows[name] = _row(row)
    return rows


def _row(sums: Mapping[str, float]) -> Row:
    """Means of the summed columns."""
    tokens = sums["tokens"]
    return {
        "tokens": int(tokens),
        "ess": _ratio(sums["weight"] ** 2, tokens * sums["weight_square"]),
        **{name: _ratio(sums[name], tokens) for name in ROW_MEANS},
    }


def _merge_rows(rows: Sequence[Row]) -> Row:
    """Rows as one, exactly: the sums are what their means were made of."""
    sums = {
        name: sum(row["tokens"] * row[name] for row in rows if row["tokens"] > 0)
        for name in ROW_MEANS
    }
    sums["tokens"] = sum(row["tokens"] for row in rows)
    sums["weight_square"] = sum(
        row["tokens"] * row["weight"] ** 2 / row["ess"] for row in rows if row["weight"] != 0
    )
    return _row(sums)


def _merge_tables(tables: Sequence[Mapping[str, Row]], names: Sequence[str]) -> dict[str, Row]:
    found = {name: [table[name] for table in tables if name in table] for name in names}
    return {name: _merge_rows(rows) for name, rows in found.items() if rows}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
