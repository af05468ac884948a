"""Where a process's time goes: seconds by activity, summing to the wall time whatever happens.

A process has one slot or several, each in exactly one activity at any time. At every change the time since the last one is
booked: to each activity the share of the slots that were in it. So the seconds of all activities sum to the wall time by
construction, and with several slots an activity has the seconds of an average slot. Time comes from one monotonic clock.
Neighbours: `slots` says how an activity is begun and ended, `tell` how the driver hears of it. May be used by several threads.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from treepo_async.metrics.categories import OTHER, Activities

MAX_ROWS = 400
"""Spans that are kept until they are told of."""


class Row(NamedTuple):
    """Something that took time, for the trace."""

    track: str
    name: str
    category: str
    begin: float
    """On the ledger's clock."""
    seconds: float
    args: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """A ledger from its beginning until `at`."""

    at: float
    wall: float
    seconds: Mapping[str, float]
    """By activity; they sum to `wall`."""

    def since(self, earlier: "Reading") -> "Reading":
        """What is in this one and not in an earlier one."""
        seconds = {name: s - earlier.seconds.get(name, 0.0) for name, s in self.seconds.items()}
        return Reading(self.at, self.wall - earlier.wall, seconds)


class SlotLedger:
    """See the module."""

    def __init__(
        self,
        activities: Activities,
        *,
        num_slots: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with all slots at rest.

        Args:
            activities: those that may be booked, and what they count as.
            num_slots: at least 1.
            clock: monotonic, in seconds.
        """
        self.activities, self.clock = activities, clock
        self._in: Counter[str] = Counter({OTHER: num_slots})
        self._num_slots = num_slots
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._began = self._at = clock()
        self._rows: list[Row] = []
        self._num_dropped = 0
        self._lock = threading.RLock()

    def move(self, before: str, after: str) -> None:
        """A slot changes its activity.

        Raises:
            KeyError: the role has no such activity.
        """
        self.activities[after]
        with self._lock:
            self._book()
            self._in[before] -= 1
            self._in[after] += 1

    def resize(self, num_slots: int) -> None:
        """Have that many slots from now on; those that come or go are at rest."""
        with self._lock:
            self._book()
            self._in[OTHER] += num_slots - self._num_slots
            self._num_slots = num_slots

    def read(self) -> Reading:
        """All up to now."""
        with self._lock:
            self._book()
            return Reading(self._at, self._at - self._began, dict(self._seconds))

    def note(self, row: Row) -> None:
        """Keep a span for the trace; of too many in a short time the later ones are only counted."""
        with self._lock:
            if len(self._rows) < MAX_ROWS:
                self._rows.append(row)
            else:
                self._num_dropped += 1

    def take_rows(self) -> tuple[list[Row], int]:
        """Spans since the last call, and how many were not kept."""
        with self._lock:
            taken = self._rows, self._num_dropped
            self._rows, self._num_dropped = [], 0
            return taken

    def _book(self) -> None:
        now = self.clock()
        per_slot = (now - self._at) / self._num_slots
        for activity, number in self._in.items():
            if number:
                self._seconds[activity] += number * per_slot
        self._at = now


class Since:
    """What a ledger has booked from one `take` to the next."""

    def __init__(self, ledger: SlotLedger) -> None:
        self._ledger, self._last = ledger, ledger.read()

    def take(self) -> Reading:
        """The seconds since the last call."""
        reading = self._ledger.read()
        taken, self._last = reading.since(self._last), reading
        return taken


def by_category(reading: Reading, activities: Activities) -> dict[str, float]:
    """Seconds by category; those without any are left out."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for activity, spent in reading.seconds.items():
        seconds[activities[activity]] += spent
    return {name: spent for name, spent in seconds.items() if spent > 0}
