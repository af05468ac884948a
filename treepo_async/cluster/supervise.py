"""The driver's loop: start every role, hand on what they tell, end with the run or with the first death for good.

Waits: for each role to be ready after its start (`start_timeout_s`), for the learner's `done`, then for the evaluation
of the last version (`eval_timeout_s`); for hosts that do not answer see `cluster.calls`. Without progress the narrator says who
is waited for (`cluster.stall`). A role that is killed is started again, and goes on where the run stands; of those whose host is
gone, with its node or alone, actors are started on another node, and all engines but the first are done without; one that ends by
itself had a reason, and unless its spec says that it survives that, the run ends with a RoleError that carries its last lines. So
it does when a role ends more often than its spec allows without a new step in between. What fails once the learner is done is
only told: the model is there. The first Ctrl-C ends the run in order, the second one at once.
"""

import contextlib
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from treepo_async.cluster.calls import Calls, HostGoneError, HostSilentError
from treepo_async.cluster.hosts import Hosts
from treepo_async.cluster.narrate import Narrator
from treepo_async.cluster.plan import Plan
from treepo_async.cluster.ray_cluster import RayCluster
from treepo_async.cluster.role import RoleReport, RoleSpec
from treepo_async.errors import RoleError

LOOK_S = 0.2
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
    narrator: Narrator
    hosts: Hosts
    _calls: Calls = field(init=False)
    _num_deaths: Counter[str] = field(default_factory=Counter)
    """Of each role, without a new step in between."""
    _step_at_death: dict[str, int] = field(default_factory=dict)
    """The run's newest step when a role last ended."""
    _stopping: bool = False

    def __post_init__(self) -> None:
        log_dir = self.plan.run_dir / "logs"
        self._calls = Calls(self.cluster.ray, self.hosts, log_dir, self.narrator.line)

    def run(self) -> str:
        """Run to the end. Gives the folder of the trained model.

        Raises:
            RoleError: a role died for good, or was not ready in time.
            StoppedError: a signal ended the run.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._start_all()
            done = self._watch_until_done()
            self._settle_if_possible(done)
        except RoleError as error:
            if self._stopping:
                # a terminal's Ctrl-C reaches Ray's processes too: they may be gone before we are told
                raise StoppedError from error
            raise
        finally:
            self._stop_all()
            self._hear_last_words()
            self.narrator.flush_step()
            self.narrator.finish()
        return str(done["model"])

    def _start_all(self) -> None:
        handles = self.hosts.handles
        starts = [(spec, handles[spec.name].start.remote()) for spec in self.plan.roles]
        for spec, start in starts:
            self._on_start(spec, start)

    def _watch_until_done(self) -> dict[str, Any]:
        """Watch until the learner is done. Gives its last event."""
        while self.narrator.done is None:
            self._look()
            self._check_start()
        return self.narrator.done

    def _settle_if_possible(self, done: dict[str, Any]) -> None:
        try:
            self._settle(done)
        except RoleError as error:
            if self._stopping:
                raise
            self.narrator.line(f"after the last step: {error}")

    def _settle(self, done: dict[str, Any]) -> None:
        """Watch until nothing is to come: the last evaluation, and word of the last weights."""
        last_evaluation = self._last_evaluation(done["num_steps"])
        deadline, evaluated = time.monotonic() + self.rules.eval_timeout_s, -1
        while self.narrator.evaluated_step < last_evaluation:
            self._look()
            if self.narrator.evaluated_step > evaluated:
                # without actors the learner may be several evaluations ahead
                evaluated = self.narrator.evaluated_step
                deadline = time.monotonic() + self.rules.eval_timeout_s
            if time.monotonic() > deadline:
                self.narrator.line("ended without the evaluation of the last policy")
                break
        deadline = time.monotonic() + SETTLE_S
        while not self.narrator.is_settled() and time.monotonic() < deadline:
            self._look()

    def _look(self) -> None:
        """Hand on what the roles told since the last look, and see who has ended."""
        roles = self.plan.roles
        pairs = list(zip(roles, self._reports(), strict=True))
        for spec, report in pairs:
            for event in report.events:
                self.narrator.on_event(spec.name, event)
        for spec, report in pairs:
            if report.exit_code is not None:
                self._on_exit(spec, report)
        self.cluster.record()
        self.narrator.tell_stall()
        if self._stopping:
            raise StoppedError
        time.sleep(LOOK_S)

    def _reports(self) -> list[RoleReport]:
        roles = self.plan.roles
        pending = [self.hosts.handles[spec.name].report.remote() for spec in roles]
        return [self._report(*pair) for pair in zip(roles, pending, strict=True)]

    def _report(self, spec: RoleSpec, reference: Any) -> RoleReport:
        """What a role has to tell; nothing of one whose host is silent, or gone where the run goes on.

        Raises:
            RoleError: it does not.
        """
        try:
            report: RoleReport = self._calls.result(spec.name, reference)
        except HostSilentError:
            return RoleReport([], None)
        except HostGoneError as error:
            self._go_on_without(spec, error)
            return RoleReport([], None)
        return report

    def _go_on_without(self, spec: RoleSpec, error: RoleError) -> None:
        """Go on after the loss of a role's host: an actor has another one, engines leave their work to those that are left.

        Args:
            spec: of the role.
            error: that told of the loss.

        Raises:
            RoleError: the same; the learner and replay have what others do not, and the first engine evaluates.
        """
        # a terminal's Ctrl-C ends hosts too
        if self._stopping:
            raise error
        if spec.module == "actor":
            self._move(spec, error)
        elif spec.module == "engine" and spec.wiring.index > 0:
            self._forget(spec)
        else:
            raise error

    def _move(self, spec: RoleSpec, error: RoleError) -> None:
        self._count_death(spec.name)
        node, there = self.hosts.node_of(spec.name), None
        if self._num_deaths[spec.name] <= spec.max_restarts:
            there = self.hosts.move(spec)
        if there is None:
            raise error
        self.narrator.line(f"{spec.name} lost its host on node {node}; starting it on {there}")
        self._start(spec)

    def _forget(self, spec: RoleSpec) -> None:
        node = self.hosts.node_of(spec.name)
        self.narrator.line(f"{spec.name} lost its host on node {node}; going on without it")
        self.hosts.drop(spec.name)
        self.plan = replace(self.plan, roles=tuple(r for r in self.plan.roles if r is not spec))
        self.narrator.forget(spec.name)

    def _start(self, spec: RoleSpec) -> None:
        self._on_start(spec, self.hosts.handles[spec.name].start.remote())

    def _on_start(self, spec: RoleSpec, start: Any) -> None:
        """Tell that a role has been started; where its host is lost meanwhile, go on as after any such loss.

        Raises:
            RoleError: the run does not go on.
        """
        try:
            pid = self._pid(spec.name, start)
        except HostGoneError as error:
            self._go_on_without(spec, error)
        else:
            self.narrator.on_start(spec.name, pid)

    def _pid(self, role: str, start: Any) -> int:
        """Of a role that is being started; a silent host is asked again, and starts it once."""
        while True:
            try:
                pid: int = self._calls.result(role, start)
            except HostSilentError:
                if self._stopping:
                    raise
                time.sleep(LOOK_S)
                start = self.hosts.handles[role].start.remote()
            else:
                return pid

    def _last_evaluation(self, num_steps: int) -> int:
        """The last policy step that is evaluated here, -1 for none; the data may have ended before the wanted steps."""
        every = self.rules.eval_every
        if every == 0:
            return -1
        last = num_steps if num_steps == self.rules.num_steps else num_steps - num_steps % every
        is_old = self.plan.resume_step is not None and last <= self.plan.resume_step
        return -1 if is_old else last

    def _check_start(self) -> None:
        limit = self.rules.start_timeout_s
        for spec in self.plan.roles:
            if self.narrator.starting_s(spec.name) > limit:
                cause = f"was not ready after {limit:g} s"
                raise RoleError(spec.name, cause, self._calls.tail_of(spec.name))

    def _on_exit(self, spec: RoleSpec, report: RoleReport) -> None:
        is_over = self.narrator.done is not None or spec.name in self.narrator.over
        if report.exit_code == 0 and is_over:
            return
        self._count_death(spec.name)
        cause = _cause(report.exit_code)
        if spec.name in self.narrator.failures:
            cause = f"{cause}: {self.narrator.failures.pop(spec.name)}"
        was_killed = report.exit_code is not None and report.exit_code < 0
        may_restart = was_killed or spec.survives_failure
        if not may_restart or self._num_deaths[spec.name] > spec.max_restarts:
            raise RoleError(spec.name, cause, report.tail)
        self.narrator.line(f"{spec.name} {cause}; starting it again (see logs/{spec.name}.log)")
        self._start(spec)

    def _count_death(self, role: str) -> None:
        """Deaths before the run's newest step are forgiven: a long run may see many."""
        newest = self.narrator.newest_step
        if newest > self._step_at_death.get(role, newest):
            self._num_deaths[role] = 0
        self._num_deaths[role] += 1
        self._step_at_death[role] = newest

    def _stop_all(self) -> None:
        """End all roles at once: an actor that waits for the engine's answer hears at once that it has gone."""
        engine_last = sorted(self.hosts.handles, key=lambda name: name.startswith("engine"))
        stops = [self.hosts.handles[n].stop.remote(self.rules.stop_timeout_s) for n in engine_last]
        limit = self.rules.stop_timeout_s + 10
        self.cluster.ray.wait(stops, num_returns=len(stops), timeout=limit)

    def _hear_last_words(self) -> None:
        """What the roles told of their time while they ended; a host that has gone has none."""
        ray, deadline = self.cluster.ray, time.monotonic() + self.rules.stop_timeout_s
        pending = {name: host.report.remote() for name, host in self.hosts.handles.items()}
        for name, reference in pending.items():
            with contextlib.suppress(ray.exceptions.RayError):
                report = ray.get(reference, timeout=max(0.0, deadline - time.monotonic()))
                self.narrator.on_last_words(name, report.events)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self._stopping:
            raise StoppedError
        self._stopping = True
        self.narrator.line(f"{signal.Signals(number).name}: stopping; once more to stop at once")


def _cause(exit_code: int | None) -> str:
    """How a process ended; a negative code is the number of a signal."""
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"ended with code {exit_code}"
