"""The driver's loop: start every role, tell what happens, end with the run or with the first death for good.

Waits: for all roles to be ready (`start_timeout_s`), for the learner's `done`, then for the evaluation of the last
version (`eval_timeout_s`). A role that dies is started again as often as its spec allows; else the run ends with a
RoleError that carries its last lines. The first Ctrl-C ends the run in order, the second one at once.
"""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treepo_async.cluster.plan import Plan
from treepo_async.cluster.ray_cluster import RayCluster
from treepo_async.cluster.role import RoleHost, RoleReport, RoleSpec
from treepo_async.errors import RoleError
from treepo_async.metrics.console import alarm_line, eval_line, step_line
from treepo_async.metrics.record import Recorder
from treepo_async.metrics.sinks import Sink

LOOK_S = 0.2
REPORT_TIMEOUT_S = 60.0
QUIET_S = 30.0
"""After this long without a line, the driver says what is waited for."""
RECORD_S = 5.0
SETTLE_S = 5.0
"""How long the end of a run waits for the engine to tell of the last weights."""


class StoppedError(KeyboardInterrupt):
    """The run was ended by a signal."""


@dataclass(frozen=True, slots=True)
class SupervisorRules:
    """Deadlines of the driver."""

    num_steps: int
    eval_every: int
    """Steps between evaluations, 0: none."""
    start_timeout_s: float
    stop_timeout_s: float
    eval_timeout_s: float


@dataclass
class Supervisor:
    """See the module."""

    cluster: RayCluster
    plan: Plan
    rules: SupervisorRules
    sinks: Sequence[Sink]
    say: Callable[[str], None]
    model: str | None = None
    """Folder of the trained model, once the learner is done."""
    _hosts: dict[str, Any] = field(default_factory=dict)
    _num_deaths: dict[str, int] = field(default_factory=dict)
    _ready: set[str] = field(default_factory=set)
    _recorder: Recorder = field(default_factory=Recorder)
    _held_step: dict[str, Any] | None = None
    """A `step` event that waits for the engine's `weights` event of its version."""
    _weights: dict[str, Any] | None = None
    """The newest `weights` event; it may be here before its step."""
    _num_steps_done: int | None = None
    _evaluated_step: int = -1
    _began: float = field(default_factory=time.monotonic)
    _last_line: float = field(default_factory=time.monotonic)
    _stopping: bool = False

    def run(self) -> int:
        """Run to the end. Gives the number of steps done.

        Raises:
            RoleError: a role died for good, or was not ready in time.
            StoppedError: a signal ended the run.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._start_all()
            self._watch()
        finally:
            self._stop_all()
            self._flush_step()
        return self._num_steps_done or 0

    def _start_all(self) -> None:
        remote = self.cluster.ray.remote(num_cpus=0, max_restarts=0)(RoleHost)
        for spec in self.plan.roles:
            log_file = self.plan.run_dir / "logs" / f"{spec.name}.log"
            self._hosts[spec.name] = remote.remote(spec, log_file)
            self._hosts[spec.name].start.remote()

    def _watch(self) -> None:
        next_record = 0.0
        done_at: float | None = None
        while not self._is_over(done_at):
            self._check_start()
            for spec, report in zip(self.plan.roles, self._reports(), strict=True):
                for event in report.events:
                    self._on_event(spec.name, event)
                if report.exit_code is not None:
                    self._on_exit(spec, report)
            if self._num_steps_done is not None and done_at is None:
                done_at = time.monotonic()
            if time.monotonic() > next_record:
                self.cluster.record()
                next_record = time.monotonic() + RECORD_S
            if self._stopping:
                raise StoppedError
            time.sleep(LOOK_S)

    def _reports(self) -> list[RoleReport]:
        pending = [self._hosts[spec.name].report.remote() for spec in self.plan.roles]
        pairs = zip(self.plan.roles, pending, strict=True)
        return [self._get(spec.name, reference) for spec, reference in pairs]

    def _get(self, role: str, reference: Any) -> Any:
        """The result of a call to a role's host."""
        ray = self.cluster.ray
        try:
            return ray.get(reference, timeout=REPORT_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            first_line = next(iter(str(error).splitlines()), "")
            cause = f"lost its Ray worker: {type(error).__name__} {first_line}"
            raise RoleError(role, cause, self._tail_of(role)) from error

    def _is_over(self, done_at: float | None) -> bool:
        """Whether the learner is done and nothing is to come: no evaluation, no word of the last weights."""
        if done_at is None:
            return False
        waited = time.monotonic() - done_at
        if self._evaluated_step < self._last_evaluation():
            return waited > self.rules.eval_timeout_s
        return self._held_step is None or waited > SETTLE_S

    def _last_evaluation(self) -> int:
        """The last policy step that is evaluated; the data may have ended before the wanted steps."""
        done, every = self._num_steps_done or 0, self.rules.eval_every
        if every == 0:
            return -1
        return done if done == self.rules.num_steps else done - done % every

    def _check_start(self) -> None:
        missing = [spec.name for spec in self.plan.roles if spec.name not in self._ready]
        waited = time.monotonic() - self._began
        if missing and waited > self.rules.start_timeout_s:
            tail = self._tail_of(missing[0])
            raise RoleError(
                missing[0], f"was not ready after {self.rules.start_timeout_s:g} s", tail
            )

    def _tail_of(self, name: str) -> str:
        log_file = Path(self.plan.run_dir / "logs" / f"{name}.log")
        return "\n".join(log_file.read_text().splitlines()[-30:]) if log_file.exists() else ""

    # ---------------------------------------------------------------- events

    def _on_event(self, role: str, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                self._ready.add(role)
                self._line(f"ready {role} after {time.monotonic() - self._began:.0f} s")
            case "tree":
                self._recorder.tree(event)
            case "engine":
                self._recorder.engine(event)
            case "step":
                self._flush_step()
                self._held_step = event
                self._match_weights()
            case "weights":
                self._weights = event
                self._match_weights()
            case "eval":
                self._evaluated_step = event["step"]
                self._line(eval_line(event))
                self._write({"step": event["step"], "time": time.time(), **_eval_record(event)})
            case "alarm":
                self._line(alarm_line(role, event))
            case "waiting":
                self._on_waiting(event)
            case "done" if role.startswith("learner"):
                self._num_steps_done, self.model = event["num_steps"], event["model"]

    def _match_weights(self) -> None:
        held, weights = self._held_step, self._weights
        if held is not None and weights is not None and held["policy_step"] == weights["step"]:
            self._flush_step()

    def _on_waiting(self, event: dict[str, Any]) -> None:
        if time.monotonic() - self._last_line > QUIET_S:
            absent = [spec.name for spec in self.plan.roles if spec.name not in self._ready]
            starting = f"; still starting: {', '.join(absent)}" if absent else ""
            self._line(f"waiting for the {event['wait']}: {event['missing']}{starting}")

    def _flush_step(self) -> None:
        """Write the held step, with the publication that followed it if that is known."""
        held, weights = self._held_step, self._weights
        if held is None:
            return
        its_own = weights is not None and weights["step"] == held["policy_step"]
        record = self._recorder.step(held, weights if its_own else None)
        self._held_step = None
        self._line(step_line(record, self.rules.num_steps))
        self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(record)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self.say(f"[{time.monotonic() - self._began:6.1f} s] {text}")

    # ---------------------------------------------------------------- ends

    def _on_exit(self, spec: RoleSpec, report: RoleReport) -> None:
        if report.exit_code == 0 and self._num_steps_done is not None:
            return
        self._num_deaths[spec.name] = self._num_deaths.get(spec.name, 0) + 1
        cause = _cause(report.exit_code)
        if self._num_deaths[spec.name] > spec.max_restarts:
            raise RoleError(spec.name, cause, report.tail)
        last = report.tail.rstrip().rpartition("\n")[2].strip(" |+-")
        self._line(f"{spec.name} {cause}; starting it again ({last}; see logs/{spec.name}.log)")
        self._get(spec.name, self._hosts[spec.name].start.remote())

    def _stop_all(self) -> None:
        """Askers first, the engine last, so that nothing is asked of what has gone."""
        engines = [n for n in self._hosts if n.startswith("engine")]
        for names in ([n for n in self._hosts if n not in engines], engines):
            stops = [self._hosts[n].stop.remote(self.rules.stop_timeout_s) for n in names]
            self.cluster.ray.wait(
                stops, num_returns=len(stops), timeout=self.rules.stop_timeout_s + 10
            )

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self._stopping:
            raise StoppedError
        self._stopping = True
        self._line(f"{signal.Signals(number).name}: stopping; once more to stop at once")


def _cause(exit_code: int | None) -> str:
    """How a process ended; a negative code is the number of a signal."""
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with code {exit_code}"


def _eval_record(event: dict[str, Any]) -> dict[str, Any]:
    return {
        "eval/sampled_accuracy": event["sampled_accuracy"],
        "eval/greedy_accuracy": event["greedy_accuracy"],
        "eval/seconds": event["seconds"],
    }
