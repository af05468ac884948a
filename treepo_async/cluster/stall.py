"""Whether a run gets on, and who is waited for where it does not: events in, now and then a line out.

Progress is an accepted tree, a step, an evaluation, new weights, a checkpoint, or a role that got ready. Without any for `stall_s`
there is a line which names whoever should end the wait, and again every `stall_s`. While a role starts, the line says that
and is no stall: the supervisor has a deadline for it. Pure: time comes in with each call, and nothing here waits.

Who is named, the first that applies: a role that starts; an engine whose host calls it sick or says nothing; a replay that
says nothing; the learner, where it was given its batch; the engines, where they have requests; the actors that hold leases;
actors that should ask for one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Event = Mapping[str, Any]

PROGRESS = ("ready", "tree", "step", "eval", "evaluated", "weights", "saved", "done")
"""Events that show that the run gets on."""
SILENT_S = 10.0
"""Engine hosts and replay speak once a second; longer than this they have fallen silent."""
WAITING_S = 15.0
"""The learner says every few seconds that it waits; longer than this after the last word it works."""


class Report(NamedTuple):
    """What is to be told."""

    text: str
    is_stall: bool
    """False where a role only starts."""


class _Heard(NamedTuple):
    event: Event
    at: float


@dataclass
class StallWatch:
    """See the module."""

    stall_s: float
    roles: Sequence[str]
    began: float
    _progress: float = field(init=False)
    _told: float = field(init=False)
    _num_trees: int = 0
    _starting: dict[str, float] = field(default_factory=dict)
    """Since when."""
    _engines: dict[str, _Heard] = field(default_factory=dict)
    _queue: _Heard | None = None
    _waiting: _Heard | None = None
    _alarms: dict[str, str] = field(default_factory=dict)
    """The newest of each role, since the last progress."""

    def __post_init__(self) -> None:
        self._progress = self._told = self.began

    def on_start(self, role: str, now: float) -> None:
        """A process of a role was started."""
        self._starting.setdefault(role, now)
        if role.startswith("engine"):
            self._engines.pop(role, None)
        elif role.startswith("replay"):
            self._queue = None

    def on_event(self, role: str, event: Event, now: float) -> None:
        """Take one event; unknown kinds are passed over."""
        kind = event["event"]
        match kind:
            case "ready":
                self._starting.pop(role, None)
            case "tree":
                self._num_trees += 1
            case "engine":
                self._engines[role] = _Heard(event, now)
            case "queue":
                self._queue = _Heard(event, now)
            case "waiting":
                self._waiting = _Heard(event, now)
            case "alarm":
                self._alarms[role] = event["alarm"]
        if kind in PROGRESS and (kind != "tree" or event["outcome"] == "accepted"):
            self._progress = now
            self._alarms.clear()

    def report(self, now: float) -> Report | None:
        """What is to be told, once there has been no progress and no report for `stall_s`."""
        if now - max(self._progress, self._told) < self.stall_s:
            return None
        self._told = now
        quiet = f"{now - self._progress:.0f} s"
        if self._starting:
            return Report(f"still starting after {quiet}: {self._starts(now)}", is_stall=False)
        facts = [*self._engine_facts(now), *self._queue_facts(now), *self._learner_facts(now)]
        return Report(
            "; ".join([f"STALLED {quiet}: waiting for {self._blocker(now)}", *facts]), is_stall=True
        )

    # ---------------------------------------------------------------- who

    def _blocker(self, now: float) -> str:
        sick = [role for role in self._of("engine") if self._trouble(role, now)]
        if sick:
            return f"{_and(sick)} to answer"
        if self._is_silent(self._queue, now):
            return _and(self._of("replay"))
        if not self._is_learner_waiting(now):
            return f"{_and(self._of('learner'))} to end its step"
        holders = _and(self._leases())
        busy = [role for role in self._of("engine") if self._in_flight(role)]
        if busy:
            return f"{self._which_tree()}: {_and(busy)} has requests in flight"
        if holders:
            return f"{self._which_tree()} by {holders}"
        return f"{_and(self._of('actor')) or 'trees'} to ask for a lease"

    def _which_tree(self) -> str:
        return "a tree" if self._num_trees else "first tree"

    def _starts(self, now: float) -> str:
        return ", ".join(f"{role} ({now - at:.0f} s)" for role, at in self._starting.items())

    # ---------------------------------------------------------------- facts

    def _engine_facts(self, now: float) -> list[str]:
        return [
            f"{role} {self._trouble(role, now) or 'healthy'}, {self._in_flight(role)} requests in flight"
            for role in self._of("engine")
        ]

    def _queue_facts(self, now: float) -> list[str]:
        facts = []
        if self._is_silent(self._queue, now):
            facts += [f"{role} silent{self._last_alarm(role)}" for role in self._of("replay")]
        leases = self._leases()
        by_actor = f" ({', '.join(f'{a}: {n}' for a, n in leases.items())})" if leases else ""
        return [*facts, f"{sum(leases.values())} leases out{by_actor}"]

    def _learner_facts(self, now: float) -> list[str]:
        if self._is_learner_waiting(now) and self._waiting is not None:
            event = self._waiting.event
            return [f"learner waits for the {event['wait']}: {event['missing']}"]
        return [f"learner works{self._last_alarm('learner-0')}"]

    def _of(self, kind: str) -> list[str]:
        return [role for role in self.roles if role.startswith(kind)]

    def _leases(self) -> dict[str, int]:
        return {} if self._queue is None else dict(self._queue.event["leases"])

    def _in_flight(self, role: str) -> int:
        heard = self._engines.get(role)
        return 0 if heard is None else int(heard.event.get("in_flight", 0))

    def _trouble(self, role: str, now: float) -> str:
        """What is wrong with an engine; empty for one that is well."""
        heard = self._engines.get(role)
        if self._is_silent(heard, now):
            return f"silent{self._last_alarm(role)}"
        return str(heard.event.get("trouble", "")) if heard else ""

    def _last_alarm(self, role: str) -> str:
        alarm = self._alarms.get(role)
        return f" (its last alarm: {alarm})" if alarm else ""

    def _is_learner_waiting(self, now: float) -> bool:
        return self._waiting is not None and now - self._waiting.at < WAITING_S

    def _is_silent(self, heard: _Heard | None, now: float) -> bool:
        return heard is None or now - heard.at > SILENT_S


def _and(names: Sequence[str] | Mapping[str, int]) -> str:
    return ", ".join(names)
