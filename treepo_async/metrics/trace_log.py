"""What the driver keeps for the trace: one JSON line for each span, counter and instant, in `trace.jsonl`.

    spans of all processes     as they tell of them
    counters                   leases by state, staleness, requests in each engine, where they change
    instants                   processes started again, alarms

Times are seconds of the day. A role's are those of its machine's monotonic clock, moved by what its first process there said
(`clock`): a clock that is set during the run moves nothing. Two machines are as far apart as their clocks were then.

The file is bounded: at `max_bytes` it becomes `trace.1.jsonl` in the place of an earlier one, and a new one is begun.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from treepo_async.metrics.sinks import JsonlSink

Event = Mapping[str, Any]

TRACE_FILE = "trace.jsonl"
OLDER_FILE = "trace.1.jsonl"
MAX_BYTES = 64 * 2**20


class RotatingSink:
    """A `JsonlSink` of bounded size: the newest records, in one file or two."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        """Go on with the file that is there.

        Args:
            folder: of the run.
            max_bytes: of a file.
        """
        self._file, self._older = folder / TRACE_FILE, folder / OLDER_FILE
        self._max_bytes = max_bytes
        self._sink = JsonlSink(self._file)
        self._num_bytes = self._file.stat().st_size

    def write(self, record: Mapping[str, Any]) -> None:
        """See `Sink`."""
        if self._num_bytes >= self._max_bytes:
            self._sink.close()
            self._file.replace(self._older)
            self._sink, self._num_bytes = JsonlSink(self._file), 0
        self._sink.write(record)
        self._num_bytes += len(json.dumps(record)) + 1

    def close(self) -> None:
        """See `Sink`."""
        self._sink.close()


class TraceLog:
    """See the module."""

    def __init__(
        self, write: Callable[[Mapping[str, Any]], None], clock: Callable[[], float] = time.time
    ) -> None:
        """Prepare.

        Args:
            write: takes the records.
            clock: of the driver, in seconds of the day.
        """
        self._write, self._clock = write, clock
        self._offsets: dict[str, float] = {}
        """By machine: time of the day less monotonic time."""
        self._machine_of: dict[str, str] = {}
        self._counts: dict[tuple[str, str], dict[str, float]] = {}
        """The newest values of each counter."""
        self._started: set[str] = set()

    def on_event(self, role: str, event: Event) -> None:
        """Take an event; kinds that are not in the trace are passed over."""
        match event["event"]:
            case "clock":
                self._machine_of[role] = event["machine"]
                offset = event["wall"] - event["monotonic"]
                self._offsets.setdefault(event["machine"], offset)
            case "spans":
                self._on_spans(role, event)
            case "queue":
                leased = sum(event["leases"].values())
                values = {"leased": leased, "accepted": event["accepted"]}
                self._count(role, "queue", {**values, "waiting": event["waiting"]})
            case "engine":
                self._count(role, "requests", {"in flight": event["in_flight"]})
            case "step" if event["staleness_max"] is not None:
                values = {"mean": event["staleness_mean"], "max": event["staleness_max"]}
                self._count(role, "staleness", values)
            case "alarm":
                self._instant(role, "alarm", {"alarm": event["alarm"]})

    def on_start(self, role: str, pid: int) -> None:
        """A process of a role was started."""
        name = "started again" if role in self._started else "started"
        self._started.add(role)
        self._instant(role, name, {"pid": pid})

    def _on_spans(self, role: str, event: Event) -> None:
        offset = self._offsets.get(self._machine_of.get(role, ""))
        if offset is None:
            # a process that never told its clock is on no time line
            return
        for track, name, category, begin, seconds, args in event["rows"]:
            self._write(
                {
                    "at": round(begin + offset, 6),
                    "s": seconds,
                    "role": role,
                    "track": track,
                    "name": name,
                    "category": category,
                    "args": args,
                }
            )

    def _count(self, role: str, name: str, values: dict[str, float]) -> None:
        if self._counts.get((role, name)) == values:
            return
        self._counts[role, name] = values
        self._write(
            {"at": round(self._clock(), 6), "role": role, "counter": name, "values": values}
        )

    def _instant(self, role: str, name: str, args: Mapping[str, Any]) -> None:
        self._write({"at": round(self._clock(), 6), "role": role, "instant": name, "args": args})


def read_trace(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run's trace, oldest file first; a last line that is not whole is left out."""
    records = []
    for name in (OLDER_FILE, TRACE_FILE):
        with contextlib.suppress(FileNotFoundError):
            for line in (run_dir / name).read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
    return records
