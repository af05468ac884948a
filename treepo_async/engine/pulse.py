"""Whether a server that runs also lives: it has work, and its counters move; or it has none, and answers a probe.

A scheduler that hangs takes requests and never answers, while its process and its HTTP port stay. Pure: what was seen comes
in with its time, in seconds of one monotonic clock.
"""

from dataclasses import dataclass
from typing import Any

PROBE_S = 10.0
"""An idle server is probed this often."""


@dataclass
class Pulse:
    """See the module."""

    hang_s: float
    """Without a sign of life a server hangs."""
    in_flight: int = 0
    """Requests that run or wait, as last seen."""
    _alive_at: float = 0.0
    _seen: Any = None
    _probed_at: float = 0.0
    _is_probing: bool = False
    _is_doubted: bool = False
    """Whether the last probe had no answer."""

    def begin(self, now: float) -> None:
        """The server was started, or is let work again."""
        self._alive_at = self._probed_at = now
        self._seen, self._is_probing, self._is_doubted = None, False, False

    def see(self, counters: Any, in_flight: int, now: float) -> None:
        """The server told its counters."""
        self.in_flight = in_flight
        self._is_doubted &= counters == self._seen
        is_idle = in_flight == 0 and not (self._is_probing or self._is_doubted)
        if counters != self._seen or is_idle:
            self._alive_at = now
        self._seen = counters

    def wants_probe(self, now: float) -> bool:
        """Whether it is time to ask an idle server for something; `probed` says how that ended."""
        is_due = self.in_flight == 0 and not self._is_probing and now - self._probed_at > PROBE_S
        self._is_probing |= is_due
        return is_due

    def probed(self, now: float, *, answered: bool) -> None:
        """A probe has ended; one without an answer counts only while the counters stand still."""
        self._is_probing, self._is_doubted = False, not answered
        self._probed_at = now
        if answered:
            self._alive_at = now

    def silent_s(self, now: float) -> float:
        """Time since the last sign of life."""
        return now - self._alive_at

    def hangs(self, now: float) -> bool:
        """Whether the server must be started again."""
        return self.silent_s(now) > self.hang_s
