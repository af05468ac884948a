from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from treepo_async.bench.sim_engine import LOOK_S, MODES, EngineSpeed
from treepo_async.bench.sim_replay import ReplaySpeed
from treepo_async.bench.sim_settings import LearnerSpeed, SimSettings, WeightsSpeed
from treepo_async.bench.sim_trees import GROWTHS, LogNormal, TreeShape
from treepo_async.bench.sim_world import World
from treepo_async.errors import ConfigError

SMALL = SimSettings(
    trees_per_actor=3,
    prompts_per_batch=4,
    num_steps=6,
    shape=TreeShape(segment_tokens=4, max_depth=4, width=4),
    lengths=LogNormal(8, 4),
    degenerate=0.3,
)
# every response has 8 tokens: two rounds of two paths of four tokens each
EVEN = SimSettings(
    actors=2,
    trees_per_actor=1,
    engines=2,
    prompts_per_batch=2,
    num_steps=8,
    shape=TreeShape(segment_tokens=4, max_depth=2, width=2),
    lengths=LogNormal(100, 1),
    engine=EngineSpeed(step_s=0.1, token_s=0.0, request_s=0.0),
    learner=LearnerSpeed(batch_s=0.5, token_s=0.0),
    replay=ReplaySpeed(0.0, 0.0, 0.0),
    weights=WeightsSpeed(publish_s=0.0, load_s=0.2),
)
T_GEN, T_TRAIN = 8 * 0.1, 0.5


def run(settings, **more):
    return World(replace(settings, **more)).run()


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    assert run(SMALL) == run(SMALL)
    assert run(SMALL).steps[-1].end_s != run(SMALL, seed=1).steps[-1].end_s


@settings(max_examples=40, deadline=None)
@given(
    staleness=st.integers(0, 4),
    mode=st.sampled_from(MODES),
    growth=st.sampled_from(GROWTHS),
    engines=st.integers(1, 3),
    load_s=st.floats(0, 2),
    each_s=st.floats(0, 1),
    train_s=st.floats(0, 2),
    seed=st.integers(0, 99),
)
def test_whatever_the_settings_leases_and_tokens_are_conserved_and_none_is_too_old(
    staleness, mode, growth, engines, load_s, each_s, train_s, seed
):
    result = run(
        SMALL,
        max_staleness=staleness,
        update_mode=mode,
        shape=replace(SMALL.shape, growth=growth),
        engines=engines,
        weights=WeightsSpeed(load_s=load_s, each_s=each_s),
        learner=LearnerSpeed(batch_s=train_s),
        seed=seed,
    )
    assert len(result.steps) == SMALL.num_steps
    assert max(max(step.lags) for step in result.steps) <= staleness
    # no lease fails, so each one ends in exactly one of trained and dropped
    assert result.leased == result.ended == result.trained + result.dropped
    assert result.trained == SMALL.num_steps * SMALL.prompts_per_batch
    assert all(sum(step.lags.values()) == step.tokens for step in result.steps)
    decoded = sum(step.decoded_tokens for step in result.steps)
    assert decoded == result.decoded_tokens
    assert decoded == sum(step.tokens + step.discarded_tokens for step in result.steps)


def test_the_synchronous_arm_takes_generation_update_and_training_in_turn():
    result = run(EVEN, max_staleness=0)
    # behind the first step an engine loads before it can generate
    assert result.mean_step_s(warm_up=1) == pytest.approx(T_GEN + T_TRAIN + LOOK_S / 2 + 0.2)
    assert result.steps[0].end_s == pytest.approx(T_GEN + T_TRAIN)


@pytest.mark.parametrize("train_s", [0.2, 0.8, 3.0])
def test_the_asynchronous_arm_comes_near_the_slower_of_generation_and_training(train_s):
    result = run(
        EVEN,
        max_staleness=4,
        update_mode="in_place",
        num_steps=60,
        learner=LearnerSpeed(batch_s=train_s, token_s=0.0),
        weights=WeightsSpeed(publish_s=0.0, load_s=0.0),
    )
    assert result.mean_step_s(warm_up=10) == pytest.approx(max(T_GEN, train_s), rel=0.05)


def test_the_accounts_of_a_role_sum_to_the_time_of_its_processes():
    result = run(SMALL, actors=2)
    seconds = result.steps[-1].end_s
    processes = {"learner": 1, "engine": 1, "replay": 1, "actor": 2 * SMALL.trees_per_actor}
    for role, number in processes.items():
        assert sum(result.seconds[role].values()) == pytest.approx(number * seconds)


def test_weights_to_one_engine_after_the_other_arrive_later_and_make_older_tokens():
    slow = run(EVEN, max_staleness=3, weights=WeightsSpeed(each_s=2.0), num_steps=20)
    fast = run(EVEN, max_staleness=3, weights=WeightsSpeed(each_s=0.0), num_steps=20)

    def mean_lag(result):
        pairs = [pair for step in result.steps for pair in step.lags.items()]
        return sum(lag * tokens for lag, tokens in pairs) / sum(tokens for _, tokens in pairs)

    assert mean_lag(slow) > mean_lag(fast)


@pytest.mark.parametrize(
    "wrong", [{"actors": 0}, {"update_mode": "swap"}, {"degenerate": 1.0}, {"num_steps": 0}]
)
def test_settings_that_cannot_be_simulated_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        run(SMALL, **wrong)
