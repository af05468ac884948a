import copy

import pytest

from tests.metrics.trace_rules import faults_of
from treepo_async.metrics.chrome_trace import chrome_trace

DAY = 1_800_000_000.0


def span(role, track, name, at, seconds, **args):
    return {
        "at": DAY + at,
        "s": seconds,
        "role": role,
        "track": track,
        "name": name,
        "category": "compute",
        "args": args,
    }


def records():
    """Two versions, and a tree of each in one of two slots, the second trained."""
    return [
        {"at": DAY, "role": "engine-0", "instant": "started", "args": {"pid": 3}},
        span("learner-0", "rank-0", "publish", 1.0, 0.5, version="0.1"),
        span("learner-0", "rank-0", "ack", 1.25, 0.25, message="Published"),
        span("engine-0", "server", "update", 1.6, 0.4, version="0.1", applied="0.1"),
        span("engine-0", "server", "load", 1.7, 0.2),
        span("actor-0", "slot-10", "grow", 2.0, 1.0, lease="a", newest="0.1"),
        span("actor-0", "slot-10", "put", 3.0, 0.1, lease="a"),
        span("actor-0", "slot-2", "grow", 2.5, 1.0, lease="b", newest="0.1"),
        span("learner-0", "rank-0", "train", 4.0, 1.0, step=1, leases=["a", "b"]),
        {"at": DAY + 2, "role": "replay-0", "counter": "queue", "values": {"leased": 2}},
    ]


def named(trace, name):
    return [e for e in trace["traceEvents"] if e["name"] == name]


def test_a_trace_keeps_the_rules_of_its_format():
    trace = chrome_trace(records())
    assert faults_of(trace) == []


def test_times_are_microseconds_since_the_first_record_whatever_the_order_of_the_records():
    trace = chrome_trace(reversed(records()))
    (load,) = named(trace, "load")
    assert (load["ts"], load["dur"], load["cat"]) == (1_700_000, 200_000, "compute")
    assert trace["otherData"] == {"start": DAY}


def test_processes_are_roles_and_threads_are_tracks_in_the_order_of_their_numbers():
    trace = chrome_trace(records())
    processes = {e["pid"]: e["args"]["name"] for e in named(trace, "process_name")}
    assert [processes[pid] for pid in sorted(processes)] == [
        "learner-0",
        "engine-0",
        "actor-0",
        "replay-0",
    ]
    actor = next(pid for pid, name in processes.items() if name == "actor-0")
    threads = [e for e in named(trace, "thread_name") if e["pid"] == actor]
    assert [e["args"]["name"] for e in sorted(threads, key=lambda e: e["tid"])] == [
        "slot-2",
        "slot-10",
    ]


def test_arrows_lead_from_a_publication_to_its_trees_and_from_a_tree_to_its_batch():
    trace = chrome_trace(records())
    arrows = [e for e in trace["traceEvents"] if e["ph"] in "stf"]
    chains = {}
    for arrow in arrows:
        chains.setdefault(arrow["id"], []).append((arrow["ph"], arrow["ts"]))
    assert sorted(chains.values()) == [
        # publish -> update -> the first tree that was grown under it
        [("s", 1_250_000), ("t", 1_800_000), ("f", 2_500_000)],
        # put of a -> train; b has none
        [("s", 3_050_000), ("f", 4_500_000)],
    ]


def test_a_run_without_records_has_an_empty_trace():
    assert chrome_trace([])["traceEvents"] == []


# ---------------------------------------------------------------- the rules themselves


def damaged(change):
    trace = copy.deepcopy(chrome_trace(records()))
    change(trace["traceEvents"])
    return faults_of(trace)


def first(events, phase):
    return next(e for e in events if e["ph"] == phase)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda e: e.append({"ph": "B", "name": "half"}), "unknown phase B"),
        (lambda e: first(e, "X").pop("dur"), "X has"),
        (lambda e: first(e, "X").update(ts=1.5), "ts=1.5 is no count"),
        (lambda e: first(e, "X").update(pid=99), "process 99 has no name"),
        (lambda e: first(e, "X").update(tid=99), "has no name"),
        (lambda e: first(e, "C").update(args={"n": "many"}), "counts"),
        (lambda e: e.remove(first(e, "f")), "arrow"),
        (lambda e: first(e, "f").update(ts=10), "touches no span"),
        (lambda e: first(e, "M").update(args={"name": 3}), "says 3"),
        (
            lambda e: next(x for x in e if x["name"] == "load").update(dur=900_000),
            "load overlaps update",
        ),
    ],
)
def test_a_trace_that_breaks_a_rule_of_the_format_is_found(change, fault):
    assert any(fault in found for found in damaged(change))
