"""The arms of `bench.py async` in simulated time: `backend=sim`, with the keys, lengths and rows of the scripted back end.

As there an engine decodes a token in a fixed time however many requests share it, every actor has an engine of its own, and
training is so slow that generation which never waits is `balance` times as fast. The simulation adds nothing of the machine
that it runs on. Tokens by lag count each token once, as it does not follow leaves.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from statistics import fmean, median

from treepo_async.bench.async_arms import ArmSettings, settings_of
from treepo_async.bench.async_cells import AsyncOptions
from treepo_async.bench.async_rows import Account, Arm, CellData, LedgerRow, StepRow, write_lags
from treepo_async.bench.sim_engine import EngineSpeed
from treepo_async.bench.sim_replay import ReplaySpeed
from treepo_async.bench.sim_result import SimResult, SimStep
from treepo_async.bench.sim_settings import LearnerSpeed, SimSettings, WeightsSpeed
from treepo_async.bench.sim_trees import LogNormal, Plan, TreeShape, draw_plan
from treepo_async.bench.sim_world import World
from treepo_async.errors import ConfigError

BACKEND = "sim"
PREFILL_SPEED = 100.0
"""Tokens of a context that are computed in the time of one decoded token."""
NUM_TREES = 400
"""From which the mean time of a tree is taken."""


def measure(options: AsyncOptions, arm: Arm, seed: int) -> CellData:
    """Simulate a cell."""
    settings = settings_of(arm, staleness=options.staleness, update_mode=options.update)
    simulated = for_arm(settings_from(options), settings, seed)
    # without its end, in which stock is trained and nothing generated
    whole = replace(simulated, num_steps=options.steps + options.spare)
    result = World(whole).run(options.steps, warm_up=options.warm_up)
    return cell_of(result, arm, seed, warm_up=options.warm_up)


def settings_from(options: AsyncOptions) -> SimSettings:
    """What all arms have in common.

    Raises:
        ConfigError: publishing alone takes longer than a batch.
    """
    keys = options.scripted
    token_s = keys.token_ms / 1e3
    plain = SimSettings(
        actors=keys.actors,
        engines=keys.actors,
        trees_per_actor=keys.slots,
        prompts_per_batch=keys.prompts,
        num_steps=options.steps,
        shape=TreeShape(
            segment_tokens=keys.segment, max_depth=keys.depth, width=keys.width, prompt_tokens=0
        ),
        lengths=LogNormal(keys.median, keys.tail),
        engine=EngineSpeed(
            step_s=token_s,
            token_s=0.0,
            request_s=0.0,
            prefix_token_s=token_s / PREFILL_SPEED,
            max_running=keys.slots * keys.width,
        ),
        replay=ReplaySpeed(),
        weights=WeightsSpeed(publish_s=keys.publish_ms / 1e3, load_s=keys.load_ms / 1e3),
    )
    return replace(plain, learner=_balanced(plain, keys.balance))


def for_arm(settings: SimSettings, arm: ArmSettings, seed: int) -> SimSettings:
    """The settings of an arm; one with the whole machine trains twice as fast."""
    speed = 2.0 if arm.has_whole_machine else 1.0
    return replace(
        settings,
        max_staleness=arm.max_staleness,
        update_mode=arm.update_mode,
        shape=replace(settings.shape, growth=arm.growth),
        learner=replace(settings.learner, token_s=settings.learner.token_s / speed),
        seed=seed,
    )


def cell_of(result: SimResult, arm: str, seed: int, *, warm_up: int) -> CellData:
    """Rows of a run that was simulated with this warm-up."""
    begin = result.steps[warm_up - 1].end_s if warm_up else 0.0
    pause = median(result.pauses) if len(result.pauses) > 1 else nan
    rows = [_row(step, arm, seed, begin, pause) for step in result.steps[warm_up:]]
    ledger = [
        LedgerRow(BACKEND, arm, seed, role, str(Account(activity)), seconds)
        for role, accounts in result.seconds.items()
        for activity, seconds in accounts.items()
    ]
    return CellData(rows, ledger)


def grow_tokens(plan: Plan) -> int:
    """Decode steps that a tree with barriers takes where nobody holds it up."""
    return sum(_longest_of_each_round(plan))


def _longest_of_each_round(plan: Plan) -> Iterator[int]:
    for number in range(plan.num_rounds):
        yield max(r.tokens for r in plan.requests if r.round == number)


def _balanced(settings: SimSettings, balance: float) -> LearnerSpeed:
    rng = random.Random("balance")
    plans = [draw_plan(settings.shape, settings.lengths, rng) for _ in range(NUM_TREES)]
    grow_s = fmean(map(grow_tokens, plans)) * settings.engine.step_s
    slots = settings.actors * settings.trees_per_actor
    batch_s = grow_s * settings.prompts_per_batch / slots
    train_s = batch_s * balance - settings.weights.publish_s
    if train_s <= 0:
        raise ConfigError(
            f"publish_ms={1e3 * settings.weights.publish_s:g}: a batch is grown in {1e3 * batch_s:.0f} ms, "
            "and publishing it must take less"
        )
    tokens = settings.prompts_per_batch * fmean(plan.tokens for plan in plans)
    return LearnerSpeed(batch_s=0.0, token_s=train_s / tokens)


def _row(step: SimStep, arm: str, seed: int, begin: float, pause: float) -> StepRow:
    lags = {lag: tokens / step.tokens for lag, tokens in step.lags.items()}
    return StepRow(
        backend=BACKEND,
        arm=arm,
        seed=seed,
        step=step.step,
        seconds=step.end_s - begin,
        trained_tokens=step.leaf_tokens,
        trained_tokens_unique=step.tokens,
        decoded_tokens=step.decoded_tokens,
        discarded_tokens=step.discarded_tokens,
        staleness_mean=sum(lag * share for lag, share in lags.items()),
        staleness_max=max(lags),
        lag_tokens=write_lags(lags.items()),
        lag_ess="",
        wait_batch_s=step.wait_batch_s,
        train_s=step.train_s,
        publish_s=step.publish_s,
        pause_s=pause,
        arrived_trees=step.delivered - step.dropped,
        trained_trees=step.trees,
    )
