"""From the rows of cells to figures: of each cell, of each arm over its seeds, and of arms against each other.

Ratios are taken between two arms of one seed and only then averaged, as the cells of a seed ran one after the other. Pure.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite, nan
from operator import attrgetter

from treepo_async.bench.async_rows import (
    BUBBLES,
    Account,
    Arm,
    CellData,
    LedgerRow,
    StepRow,
    read_lags,
)

SMOOTH = 5
"""Steps whose rewards are averaged."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over seeds."""

    mean: float
    sd: float
    """Of the seeds; NaN of a single one."""

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of the finite values; NaN where there are none."""
        known = [value for value in values if isfinite(value)]
        mean = statistics.fmean(known) if known else nan
        return cls(mean, statistics.stdev(known) if len(known) > 1 else nan)


@dataclass(frozen=True, slots=True)
class CellSummary:
    """One arm with one seed."""

    backend: str
    arm: str
    seed: int
    steps: int
    seconds: float
    tokens_per_s: float
    """Trained, of all trajectories."""
    unique_per_s: float
    step_s: float
    wait_batch_s: float
    """Mean; T_gen where nothing overlaps."""
    train_s: float
    """Mean, with publishing: T_train."""
    learner_idle: float
    """Share of the wall time in accounts that are no work."""
    actor_idle: float
    engine_idle: float
    staleness_mean: float
    staleness_max: int
    arrived_per_trained: float
    """Trees that came in to be trained over those that were: below 1 stock was trained, above it was laid in."""
    waste: float
    """Share of the decoded tokens whose trees are not trained."""
    ess: float
    pause_p50_s: float
    pause_p95_s: float
    drain_s: float
    load_s: float
    probe_s: float
    reward: float
    """Mean of the last steps."""
    accuracy: float
    """Held out, of the last evaluation."""
    to_tokens_s: float
    """Seconds until as many tokens were trained as every cell has."""
    to_reward_s: float
    """Seconds until the reward that every cell reached; NaN where there is none."""


def summarize(cells: Sequence[CellData]) -> list[CellSummary]:
    """Sum up cells of one back end, each with at least one step."""
    goal = min(sum(row.trained_tokens for row in cell.steps) for cell in cells)
    rewards = [_smooth_rewards(cell.steps)[-1] for cell in cells]
    reward = min((value for value in rewards if isfinite(value)), default=nan)
    return [_summary(cell, goal, reward) for cell in cells]


def _summary(cell: CellData, goal: int, reward: float) -> CellSummary:
    steps = cell.steps
    first, seconds = steps[0], steps[-1].seconds
    decoded = sum(row.decoded_tokens for row in steps)
    pauses = [row.pause_s for row in steps if isfinite(row.pause_s)]
    smooth = _smooth_rewards(steps)

    def mean(name: str) -> float:
        return Spread.of(getattr(row, name) for row in steps).mean

    trained = sum(row.trained_trees for row in steps)
    return CellSummary(
        backend=first.backend,
        arm=first.arm,
        seed=first.seed,
        steps=len(steps),
        seconds=seconds,
        tokens_per_s=sum(row.trained_tokens for row in steps) / seconds,
        unique_per_s=sum(row.trained_tokens_unique for row in steps) / seconds,
        step_s=seconds / len(steps),
        wait_batch_s=mean("wait_batch_s"),
        train_s=mean("train_s") + mean("publish_s"),
        learner_idle=idle_share(cell.ledger, "learner"),
        actor_idle=idle_share(cell.ledger, "actor"),
        engine_idle=idle_share(cell.ledger, "engine"),
        staleness_mean=mean("staleness_mean"),
        staleness_max=max(row.staleness_max for row in steps),
        arrived_per_trained=sum(row.arrived_trees for row in steps) / trained,
        waste=sum(row.discarded_tokens for row in steps) / decoded if decoded else nan,
        ess=mean("ess"),
        pause_p50_s=quantile(pauses, 0.5),
        pause_p95_s=quantile(pauses, 0.95),
        drain_s=mean("drain_s"),
        load_s=mean("load_s"),
        probe_s=mean("probe_s"),
        reward=smooth[-1],
        accuracy=cell.evals[-1].accuracy if cell.evals else nan,
        to_tokens_s=_seconds_to_tokens(steps, goal),
        to_reward_s=next(
            (row.seconds for row, value in zip(steps, smooth, strict=True) if value >= reward), nan
        ),
    )


def idle_share(ledger: Iterable[LedgerRow], role: str) -> float:
    """Share of a role's time that is no work; NaN where nothing is known of it."""
    seconds = accounts_of(ledger, role)
    wall = sum(seconds.values())
    return sum(seconds.get(name, 0.0) for name in BUBBLES) / wall if wall else nan


def accounts_of(ledger: Iterable[LedgerRow], role: str) -> dict[str, float]:
    """Seconds of a role by account."""
    found: defaultdict[str, float] = defaultdict(float)
    for row in ledger:
        if row.role == role:
            found[row.account] += row.seconds
    return found


def quantile(values: Iterable[float], share: float) -> float:
    """The least value that at least this share of them does not exceed; NaN of none."""
    ascending = sorted(values)
    return ascending[max(0, ceil(share * len(ascending)) - 1)] if ascending else nan


def lag_shares(steps: Iterable[StepRow]) -> dict[int, float]:
    """Share of the trained tokens by lag."""
    tokens: defaultdict[int, float] = defaultdict(float)
    for row in steps:
        for lag, share in read_lags(row.lag_tokens).items():
            tokens[lag] += share * row.trained_tokens
    total = sum(tokens.values())
    return {lag: count / total for lag, count in sorted(tokens.items())} if total else {}


def lag_ess(steps: Iterable[StepRow]) -> dict[int, float]:
    """Effective sample size by lag, mean over the steps that have the lag."""
    found: dict[int, list[float]] = {}
    for row in steps:
        for lag, value in read_lags(row.lag_ess).items():
            found.setdefault(lag, []).append(value)
    return {lag: statistics.fmean(values) for lag, values in sorted(found.items())}


def by_arm(summaries: Iterable[CellSummary]) -> dict[Arm, list[CellSummary]]:
    """The cells of each arm, the arms in the order of the ladder."""
    found: dict[Arm, list[CellSummary]] = {}
    for cell in summaries:
        found.setdefault(Arm(cell.arm), []).append(cell)
    return {arm: found[arm] for arm in Arm if arm in found}


def ratio(
    arms: Mapping[Arm, Sequence[CellSummary]],
    upper: Arm,
    lower: Arm,
    of: Callable[[CellSummary], float] = attrgetter("tokens_per_s"),
) -> Spread:
    """A figure of one arm over another's, seed by seed: trained tokens/s unless another is named."""
    below = {cell.seed: of(cell) for cell in arms.get(lower, ())}
    pairs = [(of(cell), below.get(cell.seed, nan)) for cell in arms.get(upper, ())]
    return Spread.of(a / b for a, b in pairs)


def _smooth_rewards(steps: Sequence[StepRow]) -> list[float]:
    """Of each step, the mean reward of it and those before it; NaN until there are enough."""
    rewards = [row.reward for row in steps]
    ends = range(1, len(rewards) + 1)
    return [statistics.fmean(rewards[end - SMOOTH : end]) if end >= SMOOTH else nan for end in ends]


def _seconds_to_tokens(steps: Sequence[StepRow], goal: int) -> float:
    """Between two steps tokens are taken to be trained evenly."""
    done, before = 0, 0.0
    for row in steps:
        if done + row.trained_tokens >= goal:
            return before + (row.seconds - before) * (goal - done) / row.trained_tokens
        done, before = done + row.trained_tokens, row.seconds
    return nan


def ledger_accounts(ledger: Iterable[LedgerRow], role: str) -> dict[Account, float]:
    """Shares of a role's time by account; empty where nothing is known of it."""
    seconds = accounts_of(ledger, role)
    wall = sum(seconds.values())
    return {name: seconds.get(name, 0.0) / wall for name in Account} if wall else {}
