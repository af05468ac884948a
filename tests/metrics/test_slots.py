import asyncio
from collections import Counter
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.metrics.clock import FakeClock
from treepo_async.metrics.categories import ACTOR, ENGINE, OTHER, WAITS
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot, Slots, at_gate, booked, in_flight

ACTIVITIES = ("lease", "grow", "score", "put", "back_off")


def slot_of(clock, **kwargs):
    return Slot(SlotLedger(ACTOR, clock=clock), "slot-0", **kwargs)


def seconds(slot):
    return {name: s for name, s in slot.ledger.read().seconds.items() if s}


def test_the_innermost_activity_counts():
    clock = FakeClock()
    slot = slot_of(clock)
    with slot("grow"):
        clock.passes(1)
        with slot("score"):
            clock.passes(2)
        clock.passes(4)
    clock.passes(8)
    assert seconds(slot) == {"grow": 5, "score": 2, OTHER: 8}


def test_an_activity_that_fails_is_booked_too():
    clock = FakeClock()
    slot = slot_of(clock)

    def grow():
        with slot("grow"):
            clock.passes(2)
            raise KeyError

    with pytest.raises(KeyError):
        grow()
    clock.passes(1)
    assert seconds(slot) == {"grow": 2, OTHER: 1}


def test_a_slot_is_at_the_gate_only_while_none_of_its_requests_is_in_an_engine():
    clock = FakeClock()
    slot = slot_of(clock)
    with slot("grow"):
        with slot.in_flight():
            with slot.at_gate():
                clock.passes(1)
            clock.passes(2)
        with slot.at_gate():
            clock.passes(4)
            with slot.in_flight():
                clock.passes(8)
    assert seconds(slot) == {"grow": 11, "gate": 4}


def test_waits_of_a_process_that_evaluates_are_its_evaluation_and_its_work_is_not():
    clock = FakeClock()
    slots = Slots(SlotLedger(ACTOR, clock=clock))
    growing, waiting = slots.take(2)
    with growing("grow"), waiting("lease"):
        with slots.evaluating():
            clock.passes(2)
        clock.passes(4)
    assert seconds(growing) == {"grow": 3, "evaluate": 1, "lease": 2}


def test_slots_that_are_taken_during_an_evaluation_know_of_it():
    clock = FakeClock()
    slots = Slots(SlotLedger(ACTOR, clock=clock))
    with slots.evaluating():
        (first, _) = slots.take(2)
        clock.passes(2)
        slots.take(1)
        clock.passes(1)
    clock.passes(4)
    assert seconds(first) == {"evaluate": 3, OTHER: 4}


def test_what_is_seen_counts_while_nothing_is_done():
    clock = FakeClock()
    slot = Slot(SlotLedger(ENGINE, clock=clock), "server")
    slot.rest("serve")
    clock.passes(1)
    with slot("update"):
        slot.rest(OTHER)
        clock.passes(2)
    clock.passes(4)
    assert seconds(slot) == {"serve": 1, "update": 2, OTHER: 4}


async def test_whoever_works_for_a_slot_books_on_it_without_being_given_one():
    clock = FakeClock()
    slots = Slots(SlotLedger(ACTOR, clock=clock)).take(2)

    async def work(slot, activity):
        with slot.current():
            await asyncio.create_task(inner(activity))

    async def inner(activity):
        with booked(activity):
            await asyncio.sleep(0)
            clock.passes(1)
            await asyncio.sleep(0)
            with at_gate():
                clock.passes(4)

    await work(slots[0], "score")
    await work(slots[1], "put")
    assert seconds(slots[0]) == {"score": 0.5, "put": 0.5, "gate": 4, OTHER: 5}


def test_without_a_slot_nothing_is_booked():
    with booked("grow"), at_gate(), in_flight():
        pass


def test_spans_have_their_activity_their_category_and_what_was_said_of_them():
    clock = FakeClock()
    slot = slot_of(clock)
    with slot("grow", lease="a") as words:
        clock.passes(1)
        with slot.at_gate():
            clock.passes(2)
        words["leaves"] = 6
        with slot.part("stage"):
            clock.passes(4)
    rows, _ = slot.ledger.take_rows()
    assert [(row.name, row.category, row.begin, row.seconds, row.args) for row in rows] == [
        ("gate", "wait_weights", 101, 2, {}),
        ("stage", "compute", 103, 4, {}),
        ("grow", "compute", 100, 7, {"lease": "a", "leaves": 6}),
    ]


def test_short_spans_of_a_busy_slot_are_booked_and_not_kept():
    clock = FakeClock()
    slot = slot_of(clock, least_s=0.5)
    for spent in (0.25, 0.5):
        with slot("grow"):
            clock.passes(spent)
    assert seconds(slot) == {"grow": 0.75}
    assert [row.seconds for row in slot.ledger.take_rows()[0]] == [0.5]


# ---------------------------------------------------------------- any sequence

NUM_SLOTS = 3
OPEN = st.tuples(
    st.just("open"),
    st.integers(0, NUM_SLOTS - 1),
    st.sampled_from([*ACTIVITIES, "at_gate", "in_flight", "evaluating"]),
)
END = st.tuples(st.just("end"), st.integers(0, 50), st.just(""))
PASSES = st.tuples(st.just("passes"), st.integers(0, 16), st.just(""))


@contextmanager
def of(slots, slot, what):
    if what == "evaluating":
        manager = slots.evaluating()
    elif what in ACTIVITIES:
        manager = slot(what)
    else:
        manager = getattr(slot, what)()
    with manager:
        yield


def expected(open_now, is_evaluating, number):
    """What a slot is at, from what is open on it, in the order of opening."""
    mine = [what for n, what in open_now if n == number]
    named = [what for what in mine if what in ACTIVITIES]
    activity = named[-1] if named else OTHER
    if "at_gate" in mine and "in_flight" not in mine:
        activity = "gate"
    return "evaluate" if is_evaluating and ACTOR[activity] in WAITS else activity


@given(st.lists(st.one_of(OPEN, END, PASSES), max_size=40))
def test_any_sequence_of_changes_books_every_second_of_every_slot_once(changes):
    clock = FakeClock()
    slots = Slots(SlotLedger(ACTOR, clock=clock))
    taken = slots.take(NUM_SLOTS)
    open_now, wanted = [], Counter()
    for kind, number, what in changes:
        if kind == "open" and (what != "evaluating" or not any(w == what for _, w, _ in open_now)):
            stack = ExitStack()
            stack.enter_context(of(slots, taken[number], what))
            open_now.append((number, what, stack))
        elif kind == "end" and open_now:
            # in any order: tasks of one slot need not end as they began
            open_now.pop(number % len(open_now))[2].close()
        elif kind == "passes":
            is_evaluating = any(what == "evaluating" for _, what, _ in open_now)
            pairs = [(n, what) for n, what, _ in open_now]
            for slot in range(NUM_SLOTS):
                wanted[expected(pairs, is_evaluating, slot)] += number / NUM_SLOTS
            clock.passes(number)
    reading = slots.ledger.read()
    assert reading.wall == clock.now - 100
    assert sum(reading.seconds.values()) == pytest.approx(reading.wall)
    assert {k: v for k, v in reading.seconds.items() if v} == pytest.approx(
        {k: v for k, v in wanted.items() if v}
    )
    for _, _, stack in open_now:
        stack.close()
