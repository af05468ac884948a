"""Actors that join a run from outside, and leave it while it goes on: `launch/actor.py join=RUN_DIR`.

The driver puts the wiring of its actors into `<run>/wiring.json` while the run lasts. Guests are more actors of that wiring:
they take leases, feed the same replay and sample from the same engines, and evaluate nothing. Replay takes back what a guest
held when it falls silent, and a guest that is told to end hands it back itself, so nobody waits for it.

Waits: for guests to end (`stop_timeout_s`), for the driver to be gone or its file removed: then the guests leave too. A guest
that ends by itself had a reason, which is told; the last one ends the command.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from treepo_async.cluster.plan import Plan
from treepo_async.cluster.role import RoleHost, RoleSpec
from treepo_async.config.wiring import Wiring
from treepo_async.errors import ConfigError, RoleError
from treepo_async.metrics.console import alarm_line

WIRING_FILE = "wiring.json"
"""In the folder of a run that goes on."""
LOOK_S = 0.2
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Invitation:
    """What a run says to those who want to join it."""

    run_id: str
    pid: int
    """Of the driver ..."""
    create_time: float
    """... which no later process with its pid shares."""
    cpu_threads: int
    actors: tuple[Wiring, ...]

    def is_open(self, run_dir: Path) -> bool:
        """Whether the driver that wrote it still runs, and has not withdrawn it."""
        try:
            born = psutil.Process(self.pid).create_time()
            return abs(born - self.create_time) < 1 and read(run_dir).run_id == self.run_id
        except (psutil.NoSuchProcess, ConfigError):
            return False


@contextlib.contextmanager
def invited(plan: Plan) -> Iterator[None]:
    """Let others join the run meanwhile. The file may hold the way to keys: only its owner can read it."""
    actors = [role for role in plan.roles if role.module == "actor"]
    said = {
        "run_id": plan.run_id,
        "pid": os.getpid(),
        "create_time": psutil.Process().create_time(),
        "cpu_threads": max([1, *(role.cpu_threads for role in actors)]),
        "actors": [role.wiring.to_json() for role in actors],
    }
    file = plan.run_dir / WIRING_FILE
    temporary = file.with_name(f".{WIRING_FILE}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:  # noqa: PTH123 - with its mode
        json.dump(said, out)
    temporary.replace(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def read(run_dir: Path) -> Invitation:
    """What the run in a folder says.

    Raises:
        ConfigError: no run goes on there.
    """
    file = run_dir / WIRING_FILE
    try:
        said = json.loads(file.read_text())
        said["actors"] = tuple(Wiring.parse(text) for text in said["actors"])
        return Invitation(**said)
    except FileNotFoundError as error:
        raise ConfigError(
            f"join={run_dir}: no run goes on there ({WIRING_FILE} is missing); start it with: "
            f"python launch/run.py run_dir={run_dir}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"join={run_dir}: {file} cannot be read: {error}; is it of another version of this program?"
        ) from error


def accept(run_dir: Path) -> Invitation:
    """The invitation of a run that goes on and needs actors.

    Raises:
        ConfigError: none does.
    """
    invitation = read(run_dir)
    if not invitation.is_open(run_dir):
        raise ConfigError(
            f"join={run_dir}: its driver (pid {invitation.pid}) is gone; go on with the run first: "
            f"python launch/run.py run_dir={run_dir}"
        )
    if not invitation.actors:
        raise ConfigError(
            f"join={run_dir}: its trees come from a file (data.trees), no actor is needed"
        )
    return invitation


def guests(invitation: Invitation, number: int) -> list[RoleSpec]:
    """So many more actors, spread over the engines of the run as its own are."""
    host, own = socket.gethostname().partition(".")[0], invitation.actors
    names = [f"guest-{host}-{os.getpid()}-{i}" for i in range(number)]
    return [
        RoleSpec(
            name,
            "actor",
            replace(own[i % len(own)], role=name, index=len(own) + i),
            invitation.cpu_threads,
        )
        for i, name in enumerate(names)
    ]


@dataclass
class Guests:
    """The guests of one command; see the module."""

    run_dir: Path
    invitation: Invitation
    specs: Sequence[RoleSpec]
    say: Callable[[str], None]
    stop_timeout_s: float = STOP_S
    _hosts: dict[str, RoleHost] = field(default_factory=dict)

    def run(self) -> str:
        """Be guests until the run ends. Gives how that was; a KeyboardInterrupt makes them leave.

        Raises:
            RoleError: all of them ended by themselves.
        """
        try:
            for spec in self.specs:
                self._hosts[spec.name] = RoleHost(spec, self._log_file(spec.name))
                self._hosts[spec.name].start()
                self.say(f"started {spec.name}; log: {self._log_file(spec.name)}")
            while self.invitation.is_open(self.run_dir):
                self._look()
                time.sleep(LOOK_S)
        finally:
            self._leave()
        return f"the run in {self.run_dir} has ended"

    def _look(self) -> None:
        for name, host in list(self._hosts.items()):
            report = host.report()
            for event in report.events:
                if event["event"] == "ready":
                    self.say(f"ready {name}")
                elif event["event"] == "alarm":
                    self.say(alarm_line(name, event))
                elif event["event"] == "failed":
                    self.say(f"{name} failed: {event['cause']}")
            if report.exit_code is not None and self.invitation.is_open(self.run_dir):
                del self._hosts[name]
                self.say(f"{name} ended with code {report.exit_code}")
                if not self._hosts:
                    raise RoleError(name, f"ended with code {report.exit_code}", report.tail)

    def _leave(self) -> None:
        """All at once: each hands its leases back."""
        for host in self._hosts.values():
            host.ask_to_stop()
        for host in self._hosts.values():
            host.stop(self.stop_timeout_s)

    def _log_file(self, name: str) -> Path:
        return self.run_dir / "logs" / f"{name}.log"
