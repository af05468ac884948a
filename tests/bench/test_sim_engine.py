import pytest

from treepo_async.bench.sim_clock import Clock, Stopwatch
from treepo_async.bench.sim_engine import LOOK_S, EngineSpeed, SimEngine, SimRequest
from treepo_async.errors import DataError

SPEED = EngineSpeed(step_s=1.0, token_s=0.5, request_s=0.0, prefix_token_s=0.0, max_running=2)


class Rig:
    """An engine, and when its requests ended with which tokens."""

    def __init__(self, mode="drain", speed=SPEED):
        self.clock = Clock()
        self.engine = SimEngine(self.clock, speed, mode)
        self.ended = {}

    def ask(self, name, tokens, *, least=0, context=0, cached_by=0):
        def done(pieces):
            self.ended[name] = (round(self.clock.now, 4), dict(pieces))

        self.engine.submit(SimRequest(tokens, context, cached_by, least, done))

    def run(self, number):
        self.clock.run(lambda: len(self.ended) == number)


def test_a_request_alone_takes_a_step_of_one_for_each_token():
    rig = Rig()
    rig.ask("a", 4)
    rig.run(1)
    assert rig.ended["a"] == (4 * 1.5, {0: 4})


def test_requests_that_run_together_slow_each_other_and_the_rest_goes_on_faster():
    rig = Rig()
    rig.ask("a", 2)
    rig.ask("b", 4)
    rig.run(2)
    # two steps of two, then two of one
    assert rig.ended == {"a": (4.0, {0: 2}), "b": (7.0, {0: 4})}


def test_more_requests_than_may_run_wait_in_order():
    rig = Rig()
    for name in "abc":
        rig.ask(name, 2)
    rig.run(3)
    assert rig.ended["c"] == (4.0 + 2 * 1.5, {0: 2})


def test_taking_a_request_in_holds_the_others_up():
    rig = Rig(speed=EngineSpeed(1.0, 0.0, 0.25, 0.5, 4))
    rig.ask("a", 2)
    rig.clock.after(1.0, lambda: rig.ask("b", 1, context=3, cached_by=-1))
    rig.run(2)
    # 0.25 for a, 0.25 + 3 * 0.5 for b
    assert rig.ended["a"][0] == pytest.approx(0.25 + 2.0 + 1.75)


def test_draining_lets_what_runs_end_and_the_next_one_waits_for_the_new_weights():
    rig = Rig()
    rig.ask("a", 4)
    rig.engine.offer(1, load_s=2.0)
    rig.clock.after(1.0, lambda: rig.ask("b", 1))
    rig.run(2)
    assert rig.ended["a"] == (6.0, {0: 4})
    assert rig.ended["b"] == (6.0 + 2.0 + 1.5, {1: 1})
    assert rig.engine.pauses == [pytest.approx(8.0 - LOOK_S / 2)]


@pytest.mark.parametrize(("mode", "again_s"), [("in_place", 0.0), ("retract", 5 * 0.1)])
def test_a_running_request_goes_on_under_new_weights_and_says_who_decoded_what(mode, again_s):
    rig = Rig(mode, EngineSpeed(1.0, 0.0, 0.0, 0.1, 4))
    rig.ask("a", 4, context=3)
    rig.clock.after(2.5 - LOOK_S / 2, lambda: rig.engine.offer(1, load_s=2.0))
    rig.run(1)
    # retracting computes three tokens of context and the two that were decoded again
    assert rig.ended["a"] == (pytest.approx(6.0 + again_s), {0: 2, 1: 2})


def test_a_request_for_newer_weights_waits_for_them():
    rig = Rig()
    rig.ask("a", 1, least=1)
    rig.clock.after(5.0, lambda: rig.engine.offer(1, load_s=1.0))
    rig.run(1)
    assert rig.ended["a"] == (pytest.approx(5.0 + LOOK_S / 2 + 1.0 + 1.5, abs=1e-3), {1: 1})


def test_weights_that_come_during_an_update_are_loaded_next_and_older_ones_passed_over():
    rig = Rig()
    rig.engine.offer(1, load_s=1.0)
    rig.clock.after(0.5, lambda: rig.engine.offer(2, load_s=1.0))
    rig.clock.after(0.6, lambda: rig.engine.offer(3, load_s=1.0))
    rig.ask("a", 1, least=2)
    rig.run(1)
    assert rig.ended["a"][1] == {3: 1}
    assert len(rig.engine.pauses) == 2


def test_a_cached_context_costs_nothing_until_the_weights_change():
    rig = Rig(speed=EngineSpeed(1.0, 0.0, 0.0, 1.0, 4))
    rig.ask("cached", 1, context=5, cached_by=0)
    rig.run(1)
    rig.ask("flushed", 1, context=5, cached_by=-1)
    rig.run(2)
    assert (rig.ended["cached"][0], rig.ended["flushed"][0]) == (1.0, 7.0)


def test_the_times_of_a_stopwatch_sum_to_the_time_that_passed():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.after(1.0, lambda: watch.switch("compute"))
    clock.after(3.0, lambda: watch.switch("idle"))
    clock.after(4.0, lambda: None)
    clock.run(lambda: clock.now == 4.0)
    assert watch.share("compute") == 0.5
    assert sum(watch.seconds.values()) == 4.0


def test_actions_of_one_time_run_in_the_order_in_which_they_were_asked_for():
    clock, seen = Clock(), []
    for name in "abc":
        clock.after(1.0, lambda name=name: seen.append(name))
    clock.run(lambda: len(seen) == 3)
    assert seen == ["a", "b", "c"]


def test_a_simulation_in_which_nothing_can_happen_is_named():
    with pytest.raises(DataError, match="stands still at 0"):
        Clock().run(lambda: False)
