"""What the driver tells: events of the roles become console lines, step records and the run's event log.

A step is told once the engine has told of the weights that it published, which may come before or after it; or,
when those weights were passed over, with the next step. Without an engine it is told at once.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from treepo_async.cluster.stall import StallWatch
from treepo_async.metrics.console import alarm_line, eval_line, step_line
from treepo_async.metrics.ledger_sums import LedgerSums, table
from treepo_async.metrics.record import Recorder, eval_record
from treepo_async.metrics.sinks import Sink
from treepo_async.metrics.trace_log import TraceLog

Event = dict[str, Any]

KEPT = ("started", "ready", "rank", "weights", "saved", "eval", "alarm", "failed", "done")
"""Events that go to the event log."""
FIRST_ENGINE = "engine-0"
"""Whose change of weights goes into the record of a step; the event log has those of all engines."""
DRIVER = "driver"
STALL_S = 30.0


@dataclass
class Narrator:
    """Takes events one by one; what the supervisor must know of them is in the public fields."""

    num_steps: int
    roles: Sequence[str]
    """All names, to tell who is not ready."""
    sinks: Sequence[Sink]
    """Take step records and evaluations."""
    log: Sink
    """Takes every event of a kind in `KEPT`."""
    say: Callable[[str], None]
    stall_s: float = STALL_S
    """Without progress it is said who is waited for."""
    trace: TraceLog | None = None
    """Takes what is drawn on a time line; None: nothing is kept for it."""
    ready: set[str] = field(default_factory=set)
    failures: dict[str, str] = field(default_factory=dict)
    """What each role said of its own failure."""
    done: Event | None = None
    """The learner's last event."""
    over: set[str] = field(default_factory=set)
    """Roles whose process has said that it ends as it should."""
    evaluated_step: int = -1
    """Newest policy step whose evaluation has ended, well or not."""
    newest_step: int = -1
    """Highest step of the learner that came."""
    _starts: dict[str, float] = field(default_factory=dict)
    """When the newest process of each role was started."""
    _pids: dict[str, int] = field(default_factory=dict)
    """Of every process that was told of: roles, and the learner's ranks."""
    _finished: Counter[str] = field(default_factory=Counter)
    """Leases that each actor brought to their end."""
    _recorder: Recorder = field(default_factory=Recorder)
    _ledgers: LedgerSums = field(default_factory=LedgerSums)
    _held_step: Event | None = None
    """A `step` that waits for the `weights` of its version."""
    _weights: Event | None = None
    """The newest `weights`."""
    _began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._stalls = StallWatch(self.stall_s, self.roles, self._began)

    def on_event(self, role: str, event: Event) -> None:
        """Tell and record what an event brings; unknown kinds are passed over."""
        kind = event["event"]
        self._stalls.on_event(role, event, time.monotonic())
        if self.trace is not None:
            self.trace.on_event(role, event)
        if kind in KEPT:
            self.log.write({"time": time.time(), "role": role, **event})
        handle = {
            "ready": self._on_ready,
            "rank": self._on_rank,
            "failed": self._on_failed,
            "alarm": self._on_alarm,
            "done": self._on_done,
            "over": self._on_over,
        }.get(kind)
        if handle is not None:
            handle(role, event)
        else:
            self._on_measured(role, kind, event)

    def on_last_words(self, role: str, events: Sequence[Event]) -> None:
        """Record what a role told of its time while it was ended, and heard later; that others have gone alarms nobody."""
        for event in events:
            if event["event"] == "spans" and self.trace is not None:
                self.trace.on_event(role, event)
            elif event["event"] == "ledger":
                self._log_ledgers(self._ledgers.add(role, event, None))

    def on_start(self, role: str, pid: int) -> None:
        """A role's process was started; it counts as ready once it says so."""
        self._pids[role] = pid
        self.over.discard(role)
        self._starts[role] = time.monotonic()
        self._stalls.on_start(role, time.monotonic())
        if self.trace is not None:
            self.trace.on_start(role, pid)
        self.ready.discard(role)
        self.log.write({"time": time.time(), "role": role, "event": "started", "pid": pid})

    def forget(self, role: str) -> None:
        """A role is gone for good, and the run goes on."""
        self.roles = [name for name in self.roles if name != role]
        self._stalls.roles = self.roles
        self._starts.pop(role, None)

    def line(self, text: str) -> None:
        """Say a line, with the time since the start."""
        self.say(f"[{self.seconds():6.1f} s] {text}")

    def tell_stall(self) -> None:
        """Say who is waited for, where nothing has got on for long."""
        report = self._stalls.report(time.monotonic())
        if report is None:
            return
        self.line(report.text)
        if report.is_stall:
            self.log.write(
                {"time": time.time(), "role": DRIVER, "event": "stalled", "text": report.text}
            )

    def seconds(self) -> float:
        """Time since the start."""
        return time.monotonic() - self._began

    def starting_s(self, role: str) -> float:
        """Time since a role's process was started, 0 once it is ready."""
        return 0.0 if role in self.ready else time.monotonic() - self._starts[role]

    def is_settled(self) -> bool:
        """Whether every step that came has been told."""
        return self._held_step is None

    def flush_step(self) -> None:
        """Tell the held step, with the publication that followed it if that is known."""
        held, weights = self._held_step, self._weights
        if held is None:
            return
        its_own = weights is not None and weights["step"] == held["policy_step"]
        record = self._recorder.step(held, weights if its_own else None)
        record |= self._ledgers.take_step()
        record |= {"pids": dict(self._pids), "leases_by_actor": dict(self._finished)}
        self._held_step = None
        self.line(step_line(record, self.num_steps))
        self._write(record)

    def finish(self) -> None:
        """Tell what the time of the run went into; no event comes any more."""
        self._log_ledgers(self._ledgers.take_lines())
        seconds = self._ledgers.total()
        now = {"time": time.time(), "role": DRIVER}
        self.log.write({**now, "event": "ledger_total", "seconds": seconds})
        for row in table(seconds):
            self.say(row)

    def _log_ledgers(self, lines: Sequence[Event]) -> None:
        for line in lines:
            role = line["process"].partition("/")[0]
            self.log.write({"time": time.time(), "role": role, **line})

    def _on_ready(self, role: str, _: Event) -> None:
        self.ready.add(role)
        self.line(f"ready {role} after {time.monotonic() - self._starts[role]:.0f} s")

    def _on_rank(self, role: str, event: Event) -> None:
        self._pids[f"{role}/rank-{event['rank']}"] = event["pid"]

    def _on_failed(self, role: str, event: Event) -> None:
        self.failures[role] = event["cause"]

    def _on_alarm(self, role: str, event: Event) -> None:
        self.line(alarm_line(role, event))

    def _on_done(self, role: str, event: Event) -> None:
        if role.startswith("learner"):
            self.done = event

    def _on_over(self, role: str, _: Event) -> None:
        self.over.add(role)

    def _on_measured(self, role: str, kind: str, event: Event) -> None:
        match kind:
            case "tree":
                self._finished[event["actor"]] += 1
                self._recorder.tree(event)
            case "engine":
                self._recorder.engine(event)
            case "route":
                self._recorder.route(event)
            case "ledger":
                self._log_ledgers(self._ledgers.add(role, event, time.time()))
            case "step":
                self.flush_step()
                self._held_step = event
                self.newest_step = max(self.newest_step, event["step"])
                if FIRST_ENGINE in self.roles:
                    self._match_weights()
                else:
                    self.flush_step()
            case "weights" if role == FIRST_ENGINE:
                self._weights = event
                self._match_weights()
            case "eval":
                self.line(eval_line(event))
                self._write(eval_record(event))
            case "evaluated":
                self.evaluated_step = event["step"]

    def _match_weights(self) -> None:
        held, weights = self._held_step, self._weights
        if held is not None and weights is not None and held["policy_step"] == weights["step"]:
            self.flush_step()

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)
