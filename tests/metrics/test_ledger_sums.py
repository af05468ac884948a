import pytest

from treepo_async.metrics.categories import Category
from treepo_async.metrics.ledger_sums import MERGE_S, LedgerSums, process_of, table, totals


def event(kind="actor", *, begin=0.0, seconds=None, pid=1, **fields):
    spent = seconds or {"compute": 1.5, "wait_data": 0.5}
    end = begin + sum(spent.values())
    return {"kind": kind, "pid": pid, "begin": begin, "end": end, "seconds": spent, **fields}


def test_the_shares_of_a_step_are_those_of_all_processes_of_a_kind_since_the_last_one():
    sums = LedgerSums()
    sums.add("actor-0", event(), 0.0)
    sums.add("actor-1", event(seconds={"wait_weights": 2.0}), 0.0)
    shares = sums.take_step()
    assert shares.pop("ledger/actor/seconds") == 4.0
    assert shares.pop("ledger/actor/compute") == 0.375
    assert shares.pop("ledger/actor/wait_weights") == 0.5
    assert shares.pop("ledger/actor/wait_data") == 0.125
    assert set(shares.values()) == {0.0}
    assert len(shares) == len(Category) - 3
    assert sums.take_step() == {}
    assert sums.total() == {"actor": {"compute": 1.5, "wait_data": 0.5, "wait_weights": 2.0}}


def test_shares_of_steps_are_put_together_by_the_time_that_they_are_of():
    sums, found = LedgerSums(), 0.0
    for seconds in ({"idle": 1.0}, {"compute": 6.0}, {"idle": 1.0, "compute": 2.0}):
        sums.add("actor-0", event(seconds=seconds), 0.0)
        record = sums.take_step()
        found += record["ledger/actor/seconds"] * record["ledger/actor/idle"]
    assert found == pytest.approx(sums.total()["actor"]["idle"])


def test_events_of_a_process_become_one_line_until_it_has_enough_time():
    sums, lines, begin = LedgerSums(), [], 10.0
    for number in range(20):
        lines += sums.add("actor-0", event(begin=begin), 1000.0 + number)
        begin += 2.0
    end = 10.0 + MERGE_S
    assert [(line["begin"], line["end"], line["heard"]) for line in lines] == [
        (10.0, end, (1014.0, end))
    ]
    assert lines[0]["seconds"] == {"compute": 22.5, "wait_data": 7.5}
    assert lines[0]["gap_s"] == 0.0
    (rest,) = sums.take_lines()
    assert (rest["begin"], rest["end"]) == (40.0, 50.0)
    assert totals([*lines, rest, {"event": "ready"}]) == sums.total()


def test_a_process_in_the_place_of_another_begins_a_line():
    sums = LedgerSums()
    sums.add("actor-0", event(begin=10.0), 0.0)
    (line,) = sums.add("actor-0", event(begin=50.0, pid=2), 0.0)
    assert (line["pid"], line["end"], line["gap_s"]) == (1, 12.0, 0.0)


def test_time_between_the_reports_of_a_process_is_told():
    sums = LedgerSums()
    sums.add("actor-0", event(begin=10.0), 0.0)
    sums.add("actor-0", event(begin=12.5), 0.0)
    (line,) = sums.take_lines()
    assert line["gap_s"] == 0.5


def test_ranks_of_a_learner_are_processes_of_their_own():
    assert process_of("learner-0", {"rank": 0}) == process_of("learner-0", {}) == "learner-0"
    assert process_of("learner-0", {"rank": 3}) == "learner-0/rank-3"


def test_the_table_has_kinds_by_categories_in_percent():
    sums = {"actor": {"compute": 30.0, "wait_data": 10.0}, "learner": {"sync": 5.0}}
    header, learner, actor = table(sums)
    assert header.split() == (
        [
            "time",
            "in",
            "%",
            "compute",
            "wait",
            "data",
            "wait",
            "weights",
            "wait",
            "queue",
            "sync",
            "eval",
            "idle",
            "seconds",
        ]
    )
    assert learner.split() == ["learner", "0.0", "0.0", "0.0", "0.0", "100.0", "0.0", "0.0", "5"]
    assert actor.split() == ["actor", "75.0", "25.0", "0.0", "0.0", "0.0", "0.0", "0.0", "40"]
    assert len({len(row) for row in (header, learner, actor)}) == 1
    assert table({}) == []


def test_percentages_of_a_kind_sum_to_the_whole():
    rows = table({"replay": {"compute": 1.0, "sync": 2.0, "idle": 4.0}})
    assert sum(map(float, rows[1].split()[1:8])) == pytest.approx(100, abs=0.3)


def test_what_is_heard_long_after_it_was_told_counts_and_says_nothing_of_when():
    sums = LedgerSums()
    sums.add("actor-0", event(begin=10.0), 1000.0)
    sums.add("actor-0", event(begin=12.0), None)
    (line,) = sums.take_lines()
    assert (line["end"], line["heard"]) == (14.0, (1000.0, 12.0))
