from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from treepo_async.bench.sim_drops import Drops
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
PROCESSES = {"learner": 1, "engine": 1, "replay": 1, "actor": 2 * SMALL.trees_per_actor}
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
    for role, number in PROCESSES.items():
        assert sum(result.seconds[role].values()) == pytest.approx(number * seconds)


@settings(max_examples=20, deadline=None)
@given(
    warm_up=st.integers(1, 4),
    mode=st.sampled_from(MODES),
    load_s=st.floats(0, 2),
    seed=st.integers(0, 9),
)
def test_accounts_begin_behind_the_warm_up_and_none_is_negative(warm_up, mode, load_s, seed):
    settings = replace(SMALL, update_mode=mode, weights=WeightsSpeed(load_s=load_s), seed=seed)
    result = World(settings).run(warm_up=warm_up)
    seconds = result.steps[-1].end_s - result.steps[warm_up - 1].end_s
    for role, number in PROCESSES.items():
        assert sum(result.seconds[role].values()) == pytest.approx(number * seconds)
        assert min(result.seconds[role].values()) > -1e-9


def test_an_actor_waits_for_data_where_the_learner_is_behind_and_for_the_queue_while_a_tree_is_taken():
    slow = run(EVEN, learner=LearnerSpeed(batch_s=9.0, token_s=0.0))
    assert slow.share("actor", "wait_data") > 0.8
    # two slots, eight steps of a tree each: a tree takes half a second of replay, the second one waits for it too
    taken = run(EVEN, replay=ReplaySpeed(0.0, 0.5, 0.0))
    assert taken.seconds["actor"]["wait_queue"] == pytest.approx(8 * (0.5 + 1.0))
    # scoring is work
    assert run(EVEN, score_s=0.5).seconds["actor"]["compute"] == pytest.approx(
        run(EVEN).seconds["actor"]["compute"] + 16 * 0.5
    )


def test_a_tree_that_is_shut_out_as_the_warm_up_ends_does_not_grow_less_behind_it():
    weights = WeightsSpeed(publish_s=0.0, load_s=1.0)
    settings = replace(EVEN, max_staleness=1, num_steps=6, weights=weights)
    seconds = World(settings).run(warm_up=5).seconds["actor"]
    # what is left is the last batch, two trees
    assert seconds["compute"] == pytest.approx(2 * T_GEN)


def test_an_engine_whose_gate_is_closed_updates_though_requests_still_run_behind_it():
    weights = WeightsSpeed(load_s=0.2)
    result = run(SMALL, max_staleness=3, num_steps=20, weights=weights)
    drains = sum(result.pauses) - 0.2 * len(result.pauses)
    assert drains > 0.2
    # the last update is not over when the run is
    last = result.seconds["engine"]["sync"] - sum(result.pauses)
    assert 0 <= last < 0.2


def test_trees_are_dropped_as_the_policy_has_learned_and_not_as_time_goes_by():
    # nearly none before the middle of ten steps, nearly all behind it
    curve = Drops(4, middle=5.0, scale=5.0, logits=(0.0, 40.0, 0.0), last=10.0)
    steps = run(SMALL, num_steps=10, degenerate=curve, max_refills=200, max_staleness=0).steps
    assert sum(step.dropped for step in steps[:4]) == 0
    share = sum(s.dropped for s in steps[6:]) / sum(s.delivered for s in steps[6:])
    assert share == pytest.approx(0.9, abs=0.05)
    # batches of the double size get there earlier
    large = replace(SMALL, degenerate=curve, prompts_per_batch=8)
    assert large.degenerate_at(3) == pytest.approx(curve.at(3.5 * 2**0.4))
    assert replace(SMALL, degenerate=curve).degenerate_at(3) == curve.at(3.5)


def test_dropped_trees_have_their_own_size():
    steps = run(SMALL, num_steps=60, degenerate=0.5, dropped_size=0.5, max_refills=99).steps
    dropped = sum(s.discarded_tokens for s in steps) / sum(s.dropped for s in steps)
    assert dropped / (sum(s.tokens for s in steps) / (60 * 4)) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize(
    ("rules", "per_step"), [({"drop_degenerate": False}, 0), ({"max_refills": 2}, 2)]
)
def test_a_run_drops_no_more_trees_than_its_rules_allow(rules, per_step):
    result = run(SMALL, degenerate=0.99, max_staleness=0, **rules)
    assert result.dropped == per_step * SMALL.num_steps
    assert sum(step.dropped for step in result.steps) == result.dropped
    assert sum(step.discarded_tokens for step in result.steps) == result.decoded_tokens - sum(
        step.tokens for step in result.steps
    )


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
