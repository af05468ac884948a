"""From the records of a run's trace to the trace event format of Chrome, which Perfetto opens.

    process = a role             thread = a track: a slot, a rank, a server
    X   a span                   C   a counter
    i   an instant               M   names and order of processes and threads
    s, t, f   an arrow: a publication -> the engine's change of weights -> the trees that were grown under it, and a
              tree's delivery -> the batch that was trained on it

Times are microseconds since the first record. Pure.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
TraceEvent = dict[str, Any]

ORDER = ("learner", "engine", "actor", "replay", "driver")
"""From top to bottom."""
POINT = 0.5
"""Where in a span an arrow begins or ends: of its length."""
LEAST_US = 1
"""Shorter spans are drawn that long."""


class _Places:
    """Numbers of processes and threads."""

    def __init__(self, records: Sequence[Record]) -> None:
        roles = sorted({r["role"] for r in records}, key=_rank)
        self.pids = {role: number for number, role in enumerate(roles, start=1)}
        tracks: dict[str, set[str]] = defaultdict(set)
        for record in records:
            if "track" in record:
                tracks[record["role"]].add(record["track"])
        self.tids = {
            (role, track): number
            for role in roles
            for number, track in enumerate(sorted(tracks[role], key=_by_number), start=1)
        }

    def of(self, record: Record) -> dict[str, int]:
        """Where a record is drawn; what has no track is drawn on the process."""
        tid = self.tids.get((record["role"], record.get("track", "")), 0)
        return {"pid": self.pids[record["role"]], "tid": tid}

    def names(self) -> list[TraceEvent]:
        """The events that name them."""
        events = []
        for role, pid in self.pids.items():
            head = {"ph": "M", "pid": pid, "tid": 0}
            events.append({**head, "name": "process_name", "args": {"name": role}})
            events.append({**head, "name": "process_sort_index", "args": {"sort_index": pid}})
        for (role, track), tid in self.tids.items():
            head = {"ph": "M", "pid": self.pids[role], "tid": tid}
            events.append({**head, "name": "thread_name", "args": {"name": track}})
            events.append({**head, "name": "thread_sort_index", "args": {"sort_index": tid}})
        return events


def chrome_trace(records: Iterable[Record]) -> dict[str, Any]:
    """The trace as one JSON object.

    Args:
        records: as `trace_log` writes them, in any order.
    """
    found = sorted(records, key=lambda record: record["at"])
    places = _Places(found)
    start = found[0]["at"] if found else 0.0
    drawn = [_drawn(record, places, start) for record in found]
    spans = [
        (record, event) for record, event in zip(found, drawn, strict=True) if event["ph"] == "X"
    ]
    return {
        "displayTimeUnit": "ms",
        "otherData": {"start": start},
        "traceEvents": [*places.names(), *drawn, *_arrows(spans)],
    }


def _drawn(record: Record, places: _Places, start: float) -> TraceEvent:
    place = {**places.of(record), "ts": round((record["at"] - start) * 1e6)}
    if "counter" in record:
        return {"ph": "C", "name": record["counter"], **place, "args": dict(record["values"])}
    args = dict(record["args"])
    if "instant" in record:
        return {"ph": "i", "s": "p", "name": record["instant"], **place, "args": args}
    length = max(LEAST_US, round(record["s"] * 1e6))
    name, category = record["name"], record["category"]
    return {"ph": "X", "name": name, "cat": category, **place, "dur": length, "args": args}


def _arrows(spans: Sequence[tuple[Record, TraceEvent]]) -> list[TraceEvent]:
    chains: dict[str, list[TraceEvent]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    for record, event in spans:
        name, args = record["name"], record["args"]
        match name:
            case "publish" if "version" in args:
                chains[f"version {args['version']}"].append(event)
            case "update" if "applied" in args:
                chains[f"version {args['applied']}"].append(event)
            case "grow" if "newest" in args and (record["role"], args["newest"]) not in seen:
                # the first of each actor: an arrow to every tree would hide all others
                seen.add((record["role"], args["newest"]))
                chains[f"version {args['newest']}"].append(event)
            case "put" if "reason" not in args:
                chains[f"lease {args['lease']}"].append(event)
            case "train":
                for lease in args.get("leases", ()):
                    chains[f"lease {lease}"].append(event)
    arrows = []
    for number, (_, chain) in enumerate(sorted(chains.items()), start=1):
        ordered = sorted(chain, key=_middle)
        if len(ordered) > 1:
            arrows += _arrow(number, ordered)
    return arrows


def _arrow(number: int, chain: Sequence[TraceEvent]) -> list[TraceEvent]:
    phases = ["s", *("t" for _ in chain[2:]), "f"]
    events: list[TraceEvent] = []
    for phase, event in zip(phases, chain, strict=True):
        place = {"pid": event["pid"], "tid": event["tid"], "ts": _middle(event)}
        arrow = {"ph": phase, "id": number, "name": "flow", "cat": "flow", **place}
        events.append({**arrow, "bp": "e"} if phase == "f" else arrow)
    return events


def _middle(event: TraceEvent) -> int:
    return int(event["ts"] + event["dur"] * POINT)


def _rank(role: str) -> tuple[int, str, int]:
    kind, _, number = role.partition("-")
    place = ORDER.index(kind) if kind in ORDER else len(ORDER)
    return place, kind, int(number) if number.isdigit() else 0


def _by_number(track: str) -> tuple[str, int]:
    name, _, number = track.rpartition("-")
    return (name, int(number)) if number.isdigit() else (track, -1)
