import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.engine.routing import (
    BEGIN_S,
    SMOOTH_S,
    SPILL_RATIO,
    SPILL_REQUESTS,
    Choice,
    Meter,
    Move,
    Reading,
    Scale,
    Work,
    choose,
    is_overloaded,
)

WORK = Work(decode=16, prefix=160)
IDLE = Reading(False, True, 0.0, 0.0, 0.0)
BUSY = Reading(False, True, 1000.0, 1000.0, 1000.0)

amounts = st.floats(0, 1e6)
readings = st.builds(Reading, st.booleans(), st.booleans(), amounts, amounts, amounts)
works = st.builds(Work, st.integers(0, 4096), st.integers(1, 32768))


@given(st.lists(readings, min_size=1, max_size=5), st.data(), works)
def test_an_engine_that_is_out_is_never_chosen_and_one_that_is_not_always_is(engines, data, work):
    home = data.draw(st.none() | st.integers(0, len(engines) - 1))
    choice = choose(engines, home, work)
    if all(reading.is_out for reading in engines):
        assert choice is None
        return
    assert choice is not None
    assert not engines[choice.engine].is_out
    assert choice == choose(engines, home, work), "the same readings choose the same engine"
    if home is not None:
        assert (choice.move is Move.HOME) == (choice.engine == home)
        assert (choice.move is Move.MIGRATED) == engines[home].is_out


@given(st.lists(readings, min_size=2, max_size=5), st.data(), works)
def test_a_path_leaves_only_an_engine_with_more_work_which_the_actor_itself_put_there(
    engines, data, work
):
    home = data.draw(st.integers(0, len(engines) - 1))
    choice = choose(engines, home, work)
    if choice is None or choice.move is not Move.SPILLED:
        return
    left, taken = engines[home], engines[choice.engine]
    assert left.load > taken.load
    assert left.mean_load > taken.mean_load
    assert left.own_load - work.decode > taken.own_load, "the actor does not tip its own balance"


@given(readings, readings, works)
def test_of_two_engines_never_both_are_overloaded_beside_the_other(one, two, work):
    assert not (is_overloaded(one, two, work) and is_overloaded(two, one, work))


def test_a_tree_begins_on_the_engine_with_the_least_work_and_among_equals_on_the_first():
    assert choose([BUSY, IDLE, IDLE], None, WORK) == Choice(1, Move.HOME)
    closed = IDLE._replace(is_open=False)
    assert choose([BUSY, closed], None, WORK) == Choice(1, Move.HOME), "it opens in a moment"
    assert choose([IDLE, IDLE], None, WORK) == Choice(0, Move.HOME)


def test_a_path_stays_at_home_up_to_the_bound_and_spills_beyond_it():
    other = replace_load(IDLE, 100.0)
    bound = max(SPILL_RATIO * 100.0, 100.0 + SPILL_REQUESTS * WORK.decode)
    assert choose([replace_load(BUSY, bound), other], 0, WORK) == Choice(0, Move.HOME)
    assert choose([replace_load(BUSY, bound + 1), other], 0, WORK) == Choice(1, Move.SPILLED)


def replace_load(reading, load):
    return reading._replace(load=load, mean_load=load)


def test_a_long_prefix_is_moved_for_a_larger_gain_only():
    short, long = Work(1, 160), Work(1, 160_000)
    assert choose([BUSY, IDLE], 0, short) == Choice(1, Move.SPILLED)
    assert choose([BUSY, IDLE], 0, long) == Choice(0, Move.HOME)


def test_the_crest_of_a_wave_moves_nothing():
    crest = BUSY._replace(mean_load=50.0)
    assert choose([crest, IDLE], 0, WORK) == Choice(0, Move.HOME)
    trough = BUSY._replace(load=0.0)
    assert choose([BUSY, trough], 0, WORK) == Choice(0, Move.HOME)


def test_an_actor_does_not_move_its_paths_for_the_work_of_others():
    others = BUSY._replace(own_load=10.0)
    assert choose([others, IDLE], 0, WORK) == Choice(0, Move.HOME)


def test_nothing_is_moved_to_where_it_would_have_to_wait():
    closed, out = IDLE._replace(is_open=False), IDLE._replace(is_out=True)
    assert choose([BUSY, closed], 0, WORK) == Choice(0, Move.HOME)
    assert choose([BUSY._replace(is_open=False), closed], 0, WORK) == Choice(0, Move.HOME)
    assert choose([out, closed, BUSY], 0, WORK) == Choice(2, Move.MIGRATED)


def test_a_path_whose_home_is_out_migrates_and_nothing_goes_where_all_are_out():
    out = IDLE._replace(is_out=True)
    assert choose([out, BUSY], 0, WORK) == Choice(1, Move.MIGRATED)
    assert choose([out, out], 0, WORK) is None


def test_a_meter_knows_its_own_work_at_once_and_that_of_others_by_the_size_of_its_own():
    meter = Meter()
    meter.add(16, 1.0)
    meter.add(16, 1.0)
    meter.told(5, 1.0)
    reading = meter.reading(1.0, is_out=False, is_open=True)
    assert reading.own_load == 32
    assert reading.load == 32 + 3 * 16
    meter.remove(16, 2.0)
    assert meter.reading(2.0, is_out=False, is_open=True).own_load == 16


def test_the_mean_load_follows_the_load_with_its_time_constant():
    meter = Meter()
    meter.add(100, 0.0)
    reading = meter.reading(SMOOTH_S, is_out=False, is_open=True)
    assert reading.mean_load == pytest.approx(100 * (1 - 1 / 2.718281828), rel=1e-6)
    assert reading.load == 100


def test_requests_that_only_compute_a_prefix_say_nothing_of_how_large_those_of_others_are():
    meter = Meter()
    for tokens in (16, 0, 0, 16, 0):
        meter.add(tokens, 1.0)
    assert meter.scale.tokens == 16


def test_trees_that_have_not_asked_yet_count_and_what_they_ask_takes_the_place_of_it():
    meter = Meter(Scale(16.0))
    first, second = meter.begin(0.0), meter.begin(1.0)
    assert meter.reading(1.0, is_out=False, is_open=True).load == 32
    meter.asked(first)
    meter.add(16, 1.0)
    assert meter.reading(1.0, is_out=False, is_open=True).load == 32
    meter.asked(first)
    assert meter.begun == {second: 1.0}, "whatever else the first tree asks"
    assert meter.reading(1.0 + BEGIN_S, is_out=False, is_open=True).load == 16
    meter.asked(second)
    assert meter.begun == {}
