"""The trace event format, as strictly as a viewer may read it: what is wrong with a trace, in words."""

import json
from collections import defaultdict

REQUIRED = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"name", "pid", "tid", "ts", "args"},
    "i": {"name", "pid", "tid", "ts", "s", "args"},
    "M": {"name", "pid", "tid", "args"},
    "s": {"name", "cat", "pid", "tid", "ts", "id"},
    "t": {"name", "cat", "pid", "tid", "ts", "id"},
    "f": {"name", "cat", "pid", "tid", "ts", "id", "bp"},
}
METADATA = {
    "process_name": str,
    "thread_name": str,
    "process_sort_index": int,
    "thread_sort_index": int,
}


def faults_of(trace):
    """Everything that is wrong with a trace, in the order of its events."""
    json.dumps(trace, allow_nan=False)
    events = trace["traceEvents"]
    faults = [fault for event in events for fault in _shape(event)]
    if faults:
        return faults
    return [*_names(events), *_nesting(events), *_flows(events)]


def _shape(event):
    phase = event.get("ph")
    if phase not in REQUIRED:
        yield f"unknown phase {phase}"
        return
    if set(event) - {"ph"} != REQUIRED[phase]:
        yield f"{phase} has {sorted(set(event) - {'ph'})}, not {sorted(REQUIRED[phase])}"
        return
    for number in ("pid", "tid", "ts", "dur", "id"):
        if number in event and (type(event[number]) is not int or event[number] < 0):
            yield f"{phase} {event['name']}: {number}={event[number]!r} is no count"
    if phase == "X" and event["dur"] < 1:
        yield f"X {event['name']} takes no time"
    if phase == "C" and not all(type(v) in (int, float) for v in event["args"].values()):
        yield f"C {event['name']} counts {event['args']}"
    if phase == "i" and event["s"] not in ("g", "p", "t"):
        yield f"i {event['name']} has scope {event['s']}"
    if phase == "M":
        (value,) = event["args"].values()
        if type(value) is not METADATA.get(event["name"]):
            yield f"M {event['name']} says {value!r}"


def _names(events):
    named = {
        (e["name"], e["pid"], e["tid"])
        for e in events
        if e["ph"] == "M" and e["name"].endswith("_name")
    }
    for event in events:
        if ("process_name", event["pid"], 0) not in named:
            yield f"process {event['pid']} has no name"
        if event["ph"] == "X" and ("thread_name", event["pid"], event["tid"]) not in named:
            yield f"thread {event['pid']}/{event['tid']} has no name"


def _nesting(events):
    """Spans of one thread lie in each other or apart; a microsecond of rounding is let pass."""
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    for place, spans in threads.items():
        open_spans = []
        for span in sorted(spans, key=lambda e: (e["ts"], -e["dur"])):
            while open_spans and open_spans[-1]["ts"] + open_spans[-1]["dur"] <= span["ts"] + 1:
                open_spans.pop()
            if open_spans:
                outer = open_spans[-1]
                if span["ts"] + span["dur"] > outer["ts"] + outer["dur"] + 2:
                    yield f"{span['name']} overlaps {outer['name']} on {place}"
            open_spans.append(span)


def _flows(events):
    """An arrow begins once, ends once, later, and both in a span."""
    spans = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            spans[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    flows = defaultdict(list)
    for event in events:
        if event["ph"] in "stf":
            flows[event["id"]].append(event)
            inside = spans[event["pid"], event["tid"]]
            if not any(begin <= event["ts"] <= end for begin, end in inside):
                yield f"arrow {event['id']} touches no span"
    for number, flow in flows.items():
        phases = "".join(event["ph"] for event in flow)
        if phases != "s" + "t" * (len(flow) - 2) + "f":
            yield f"arrow {number} is {phases}"
        if [e["ts"] for e in flow] != sorted(e["ts"] for e in flow):
            yield f"arrow {number} goes back in time"
