"""All ledgers of a run, as the driver adds them up: shares per step, a table at its end, lines for the event log.

An event of a process covers the time since its last one, so what is added here is the whole of a process's time, up to the
last event of one that was killed. Pure: events in, numbers out.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from treepo_async.metrics.categories import KINDS, Category

Event = Mapping[str, Any]
Seconds = dict[str, dict[str, float]]
"""By kind of process, then by category."""

MERGE_S = 30.0
"""So much of a process's time goes into one line of the event log."""


def process_of(role: str, event: Event) -> str:
    """The name of a process: its role, or that and the rank."""
    return f"{role}/rank-{event['rank']}" if event.get("rank") else role


@dataclass
class LedgerLine:
    """Consecutive events of one process as one."""

    process: str
    kind: str
    pid: int
    begin: float
    """On the monotonic clock of its machine."""
    end: float
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    heard: tuple[float, float] | None = None
    """When the driver heard an event last, in seconds of the day, and its end."""
    gap_s: float = 0.0
    """Between events, where the end of one should be the beginning of the next."""

    def add(self, event: Event, heard: float | None) -> None:
        """Take the event that follows; see `LedgerSums.add`."""
        if heard is not None:
            self.heard = round(heard, 3), event["end"]
        self.gap_s += abs(event["begin"] - self.end)
        self.end = event["end"]
        for category, seconds in event["seconds"].items():
            self.seconds[category] += seconds

    def record(self) -> dict[str, Any]:
        """For the event log."""
        return {
            "event": "ledger",
            "process": self.process,
            "kind": self.kind,
            "pid": self.pid,
            "begin": round(self.begin, 6),
            "end": round(self.end, 6),
            "gap_s": round(self.gap_s, 6),
            "heard": self.heard,
            "seconds": {name: round(spent, 6) for name, spent in self.seconds.items()},
        }


class LedgerSums:
    """See the module."""

    def __init__(self) -> None:
        self._total: Seconds = {}
        self._since_step: Seconds = {}
        self._lines: dict[str, LedgerLine] = {}

    def add(self, role: str, event: Event, heard: float | None) -> list[dict[str, Any]]:
        """Take an event. Gives the lines that are full.

        Args:
            role: whose process told it.
            event: a `ledger`.
            heard: when, in seconds of the driver's day; None where that was long after it was told.
        """
        for sums in (self._total, self._since_step):
            of_kind = sums.setdefault(event["kind"], {})
            for category, seconds in event["seconds"].items():
                of_kind[category] = of_kind.get(category, 0.0) + seconds
        process = process_of(role, event)
        line = self._lines.get(process)
        full = []
        if line is not None and line.pid != event["pid"]:
            full.append(self._lines.pop(process).record())
            line = None
        if line is None:
            head = (process, event["kind"], event["pid"], event["begin"], event["begin"])
            line = self._lines[process] = LedgerLine(*head)
        line.add(event, heard)
        if line.end - line.begin >= MERGE_S:
            full.append(self._lines.pop(process).record())
        return full

    def take_lines(self) -> list[dict[str, Any]]:
        """All lines that were begun."""
        lines, self._lines = self._lines, {}
        return [line.record() for line in lines.values()]

    def take_step(self) -> dict[str, float]:
        """Shares since the last call, as `ledger/<kind>/<category>`; kinds of which nothing was heard are left out.

        Of which time they are shares is in `ledger/<kind>/seconds`: that which was told, which is not the time of the step.
        """
        shares = _shares(self._since_step)
        told = {f"ledger/{kind}/seconds": sum(self._since_step[kind].values()) for kind in shares}
        self._since_step = {}
        return told | {
            f"ledger/{kind}/{category}": share
            for kind, of_kind in shares.items()
            for category, share in of_kind.items()
        }

    def total(self) -> Seconds:
        """Seconds by kind and category, of all processes so far."""
        return {kind: dict(of_kind) for kind, of_kind in self._total.items()}


def totals(lines: Iterable[Event]) -> Seconds:
    """The same from lines of the event log; those of other events are passed over."""
    sums: Seconds = {}
    for line in lines:
        if line.get("event") != "ledger":
            continue
        of_kind = sums.setdefault(line["kind"], {})
        for category, seconds in line["seconds"].items():
            of_kind[category] = of_kind.get(category, 0.0) + seconds
    return sums


def table(seconds: Seconds) -> list[str]:
    """Kinds by categories in percent of each kind's time, for a person; empty without any time."""
    shares = _shares(seconds)
    if not shares:
        return []
    rows = [["time in %", *(c.replace("_", " ") for c in Category), "seconds"]]
    for kind, of_kind in shares.items():
        cells = [f"{100 * of_kind[category]:.1f}" for category in Category]
        rows.append([kind, *cells, f"{sum(seconds[kind].values()):.0f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def _shares(sums: Seconds) -> Seconds:
    """Of each kind, every category's part of its time; kinds in the order of `KINDS`."""
    shares: Seconds = {}
    for kind in KINDS:
        wall = sum(sums.get(kind, {}).values())
        if wall > 0:
            shares[kind] = {c.value: sums[kind].get(c, 0.0) / wall for c in Category}
    return shares
