"""Simulated time: a heap of what happens when. Neighbours: `sim_engine`, `sim_replay` and `sim_world` happen on it.

Invariant: actions run in the order of their times, and those of one time in the order in which they were asked for, so
that a simulation depends on its settings and its seed alone. Nothing waits: the clock jumps from action to action.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

from treepo_async.errors import DataError

Action = Callable[[], None]


@dataclass
class Clock:
    """Runs actions."""

    now: float = 0.0
    """Seconds."""
    _heap: list[tuple[float, int, Action]] = field(default_factory=list)
    _number: int = 0

    def after(self, delay_s: float, action: Action) -> None:
        """Run an action so many seconds from now, at least 0."""
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._number, action))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Run actions until it is over.

        Raises:
            DataError: nothing is left to happen, and it is not over.
        """
        while not is_over():
            if not self._heap:
                raise DataError(f"the simulation stands still at {self.now:.3f} s")
            self.now, _, action = heapq.heappop(self._heap)
            action()


@dataclass
class Stopwatch:
    """Simulated seconds by activity; they sum to the time between the first `switch` and `close`."""

    clock: Clock
    activity: str = "idle"
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0

    def switch(self, activity: str) -> None:
        """From here on this is what is done."""
        spent = self.clock.now - self._since
        self.seconds[self.activity] = self.seconds.get(self.activity, 0.0) + spent
        self.activity, self._since = activity, self.clock.now

    def move(self, activity: str, to: str, seconds: float) -> None:
        """So much of one activity was another."""
        self.seconds[activity] = self.seconds.get(activity, 0.0) - seconds
        self.seconds[to] = self.seconds.get(to, 0.0) + seconds

    def restart(self) -> None:
        """Forget what was before; what is done goes on."""
        self.seconds.clear()
        self._since = self.clock.now

    def share(self, activity: str) -> float:
        """Of the time so far."""
        self.switch(self.activity)
        whole = sum(self.seconds.values())
        return self.seconds.get(activity, 0.0) / whole if whole else 0.0
