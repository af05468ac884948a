import pytest

from treepo_async.cluster.time_booked import time_booked
from treepo_async.metrics.ledger_sums import LedgerSums

DAY = 1_800_000_000.0


def lines_of(*, num_events=40, every=2.0, pid=7, change=lambda number, event: None):
    """The log lines of an actor whose events are changed before they are added up."""
    sums, lines = LedgerSums(), []
    for number in range(num_events):
        begin = 50.0 + number * every
        event = {
            "event": "ledger",
            "kind": "actor",
            "pid": pid,
            "begin": begin,
            "end": begin + every,
            "seconds": {"compute": 0.75 * every, "wait_data": 0.25 * every},
        }
        heard = DAY + event["end"] + 0.3 * (number % 2)
        heard += change(number, event) or 0.0
        lines += sums.add("actor-0", event, heard)
    return [*lines, *sums.take_lines()]


def test_time_that_is_booked_once_is_told_and_holds():
    verdict = time_booked([*lines_of(), *lines_of(pid=8, num_events=3)])
    assert verdict.holds
    assert verdict.text == "86 s of 2 processes, each within 1%"


def lose_seconds(number, event):
    event["seconds"]["compute"] -= 0.06


def book_twice(number, event):
    event["seconds"]["compute"] += 0.06


def leave_a_gap(number, event):
    event["begin"] += 0.06
    event["seconds"]["compute"] -= 0.06


def stand_still(number, event):
    return 0.1 * number


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lose_seconds, "actor-0: 77.60 s booked of 80.00 s"),
        (book_twice, "actor-0: 82.40 s booked of 80.00 s"),
        (leave_a_gap, "booked of"),
        (stand_still, "s told, "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_time_that_is_booked_twice_or_not_at_all_is_found(change, text):
    verdict = time_booked(lines_of(change=change))
    assert not verdict.holds
    assert text in verdict.text


def test_reports_that_do_not_follow_each_other_are_found():
    def overlap(number, event):
        event["begin"] -= 0.05
        event["end"] -= 0.05 * (number % 2)

    verdict = time_booked(lines_of(change=overlap))
    assert not verdict.holds
    assert "between its reports" in verdict.text


def test_a_run_that_has_told_of_no_time_has_not_booked_it():
    verdict = time_booked([])
    assert not verdict.holds
    assert verdict.text == "no process has told what its time went into"
