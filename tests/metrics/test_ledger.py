import pytest

from tests.metrics.clock import FakeClock
from treepo_async.metrics.categories import ACTOR, KINDS, LEARNER, OTHER, Category
from treepo_async.metrics.ledger import MAX_ROWS, Row, Since, SlotLedger, by_category


def test_every_kind_of_process_has_a_place_to_rest_and_its_activities_have_categories():
    for activities in KINDS.values():
        assert activities[OTHER] is Category.IDLE
        assert set(activities.values()) <= set(Category)


def test_time_at_no_activity_is_at_rest_and_all_sums_to_the_wall_time():
    clock = FakeClock()
    ledger = SlotLedger(LEARNER, clock=clock)
    clock.passes(0.5)
    ledger.move(OTHER, "wait_batch")
    clock.passes(3)
    ledger.move("wait_batch", "train")
    clock.passes(2)
    reading = ledger.read()
    assert reading.seconds == {OTHER: 0.5, "wait_batch": 3, "train": 2}
    assert reading.wall == sum(reading.seconds.values()) == 5.5


def test_an_activity_of_several_slots_has_the_seconds_of_an_average_slot():
    clock = FakeClock()
    ledger = SlotLedger(ACTOR, num_slots=4, clock=clock)
    ledger.move(OTHER, "grow")
    clock.passes(8)
    assert ledger.read().seconds == {OTHER: 6, "grow": 2}


def test_slots_that_come_later_rest_until_they_are_used():
    clock = FakeClock()
    ledger = SlotLedger(ACTOR, clock=clock)
    ledger.move(OTHER, "grow")
    clock.passes(1)
    ledger.resize(2)
    clock.passes(4)
    assert ledger.read().seconds == {"grow": 3, OTHER: 2}


def test_what_is_taken_starts_where_the_last_taking_ended():
    clock = FakeClock()
    ledger = SlotLedger(LEARNER, clock=clock)
    first, second = Since(ledger), Since(ledger)
    clock.passes(2)
    assert first.take().wall == 2
    clock.passes(1)
    assert first.take().seconds == {OTHER: 1}
    assert second.take().seconds == {OTHER: 3}, "readers do not disturb each other"


def test_an_activity_that_the_role_does_not_have_is_refused():
    with pytest.raises(KeyError, match="grow"):
        SlotLedger(LEARNER).move(OTHER, "grow")


def test_activities_of_one_category_are_added_up():
    clock = FakeClock()
    ledger = SlotLedger(LEARNER, clock=clock)
    ledger.move(OTHER, "publish")
    clock.passes(1)
    ledger.move("publish", "save")
    clock.passes(2)
    assert by_category(ledger.read(), LEARNER) == {"sync": 3}


def test_of_too_many_spans_the_later_ones_are_counted_and_not_kept():
    ledger = SlotLedger(LEARNER)
    for number in range(MAX_ROWS + 3):
        ledger.note(Row("track", str(number), "sync", 0.0, 1.0, {}))
    rows, num_dropped = ledger.take_rows()
    assert ([row.name for row in rows], num_dropped) == ([str(n) for n in range(MAX_ROWS)], 3)
    assert ledger.take_rows() == ([], 0)
