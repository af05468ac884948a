import pytest

from tests.fakes import events_in
from treepo_async.actor.health import LEAST, WINDOW, Health
from treepo_async.engine.answer import NotFiniteError
from treepo_async.errors import DeadlineError, EngineError

NAN = NotFiniteError("not finite")


def feed(health, *, good, bad):
    """So many of each, spread evenly."""
    for i in range(good + bad):
        if (i + 1) * bad // (good + bad) > i * bad // (good + bad):
            health.bad(NAN)
        else:
            health.good()


def alarms(capsys):
    return [event["trees"] for event in events_in(capsys.readouterr().out, "alarm")]


def test_failures_in_a_row_end_the_actor_and_one_tree_in_between_does_not():
    health = Health(sick_after=3)
    for _ in range(5):
        health.bad(EngineError("a"))
        health.bad(EngineError("b"))
        health.good()
    health.bad(EngineError("a"))
    health.bad(EngineError("b"))
    with pytest.raises(EngineError, match=r"3 leases in a row failed \(actor\.sick_after\).*: c"):
        health.bad(EngineError("c"))


def test_a_percent_of_trees_that_are_not_finite_is_borne_in_silence(capsys):
    health = Health(sick_after=99)
    feed(health, good=99, bad=1)
    assert (health.num_not_finite, alarms(capsys)) == (1, [])


def test_more_than_a_percent_is_alarmed_once_and_again_after_it_was_well(capsys):
    health = Health(sick_after=99)
    feed(health, good=95, bad=5)
    feed(health, good=95, bad=5)
    assert len(alarms(capsys)) == 1
    feed(health, good=WINDOW, bad=0)
    feed(health, good=90, bad=10)
    assert len(alarms(capsys)) == 1


def test_more_than_a_fifth_ends_the_actor():
    feed(Health(sick_after=99), good=400, bad=100)
    health = Health(sick_after=99)
    with pytest.raises(EngineError, match=r"engine is sick: 2.% of the last .* not finite"):
        feed(health, good=300, bad=100)


def test_few_leases_say_nothing_of_a_share():
    health = Health(sick_after=99)
    for _ in range(LEAST - 1):
        health.bad(NAN)
    with pytest.raises(EngineError, match="engine is sick: 100% of the last 20 trees"):
        health.bad(NAN)


def test_other_failures_do_not_make_an_engine_sick():
    health = Health(sick_after=999)
    for _ in range(200):
        health.bad(EngineError("no completion"))


LATE = DeadlineError("a tree", "the engine", 600.0)


def test_trees_grown_at_once_that_outlive_their_deadlines_are_one_failure():
    health = Health(sick_after=2)
    begun = [health.begin() for _ in range(16)]
    for each in begun:
        health.bad(LATE, each)
    assert health.num_in_a_row == 1
    again = health.begin()
    with pytest.raises(EngineError, match="2 leases in a row"):
        health.bad(LATE, again)


def test_failures_that_are_no_deadlines_count_each():
    health = Health(sick_after=3)
    begun = [health.begin() for _ in range(3)]
    for each in begun[:2]:
        health.bad(EngineError("a"), each)
    with pytest.raises(EngineError, match="3 leases in a row"):
        health.bad(EngineError("a"), begun[2])
