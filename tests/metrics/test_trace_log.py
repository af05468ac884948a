import json

from treepo_async.metrics.trace_log import (
    OLDER_FILE,
    TRACE_FILE,
    RotatingSink,
    TraceLog,
    read_trace,
)

DAY = 1_800_000_000.0


def clock_event(machine="m", monotonic=50.0, wall=DAY):
    return {"event": "clock", "machine": machine, "monotonic": monotonic, "wall": wall}


def spans(*begins):
    rows = [["slot-0", "grow", "compute", begin, 0.5, {"lease": "a"}] for begin in begins]
    return {"event": "spans", "rows": rows}


def log_of():
    records = []
    return records, TraceLog(records.append, clock=lambda: DAY + 7)


def test_spans_come_at_the_time_of_day_of_their_machine():
    records, log = log_of()
    log.on_event("actor-0", clock_event())
    log.on_event("actor-0", spans(53.0))
    assert records == [
        {
            "at": DAY + 3,
            "s": 0.5,
            "role": "actor-0",
            "track": "slot-0",
            "name": "grow",
            "category": "compute",
            "args": {"lease": "a"},
        }
    ]


def test_a_clock_that_is_set_between_two_starts_moves_nothing():
    records, log = log_of()
    log.on_event("actor-0", clock_event())
    log.on_event("actor-1", clock_event(monotonic=60.0, wall=DAY + 10 - 3600))
    log.on_event("actor-1", spans(61.0))
    assert records[0]["at"] == DAY + 11


def test_machines_have_clocks_of_their_own():
    records, log = log_of()
    log.on_event("actor-0", clock_event())
    log.on_event("actor-1", clock_event(machine="other", monotonic=9000.0, wall=DAY + 1))
    log.on_event("actor-1", spans(9001.0))
    assert records[0]["at"] == DAY + 2


def test_a_process_that_told_no_clock_is_left_out():
    records, log = log_of()
    log.on_event("actor-0", spans(53.0))
    assert records == []


def test_counters_are_kept_where_they_change():
    records, log = log_of()
    queue = {"event": "queue", "leases": {"actor-0": 2, "actor-1": 1}, "accepted": 4, "waiting": 0}
    for accepted in (4, 4, 5):
        log.on_event("replay-0", {**queue, "accepted": accepted})
    log.on_event("engine-0", {"event": "engine", "in_flight": 3})
    log.on_event("learner-0", {"event": "step", "staleness_mean": 0.5, "staleness_max": 2})
    log.on_event("learner-0", {"event": "step", "staleness_mean": None, "staleness_max": None})
    assert [(r["role"], r["counter"], r["values"]) for r in records] == [
        ("replay-0", "queue", {"leased": 3, "accepted": 4, "waiting": 0}),
        ("replay-0", "queue", {"leased": 3, "accepted": 5, "waiting": 0}),
        ("engine-0", "requests", {"in flight": 3}),
        ("learner-0", "staleness", {"mean": 0.5, "max": 2}),
    ]


def test_a_restart_and_an_alarm_are_instants():
    records, log = log_of()
    log.on_start("engine-0", 11)
    log.on_start("engine-0", 12)
    log.on_event("engine-0", {"event": "alarm", "alarm": "engine restarted", "detail": "long"})
    assert [(r["instant"], r["args"]) for r in records] == [
        ("started", {"pid": 11}),
        ("started again", {"pid": 12}),
        ("alarm", {"alarm": "engine restarted"}),
    ]


def test_the_file_is_bounded_and_the_newest_records_stay(tmp_path):
    sink = RotatingSink(tmp_path, max_bytes=100)
    for number in range(40):
        sink.write({"number": number})
    sink.close()
    sizes = [(tmp_path / name).stat().st_size for name in (TRACE_FILE, OLDER_FILE)]
    assert all(size < 100 + 20 for size in sizes)
    numbers = [record["number"] for record in read_trace(tmp_path)]
    assert numbers == list(range(numbers[0], 40))
    assert len(numbers) > 7


def test_a_run_that_goes_on_goes_on_with_its_trace(tmp_path):
    for number in range(2):
        sink = RotatingSink(tmp_path)
        sink.write({"number": number})
        sink.close()
    with (tmp_path / TRACE_FILE).open("a") as file:
        file.write('{"number": 2, "a line of a driver that was kil')
    assert [record["number"] for record in read_trace(tmp_path)] == [0, 1]


def test_there_is_no_trace_without_its_file(tmp_path):
    assert read_trace(tmp_path) == []
    (tmp_path / TRACE_FILE).write_text(json.dumps({"number": 1}) + "\n")
    assert read_trace(tmp_path) == [{"number": 1}]
