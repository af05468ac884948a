"""A small run of real processes that a test may kill and freeze, and what it came to.

    Rig -> forks `roles.main` for replay, each actor and the learner -> starts again what died -> `Outcome`

The processes are forked from one that has imported everything, so that a role is back in a few hundredths of a second:
what a test then sees of a recovery is the time of the parts under test, not that of imports. A thread watches the
processes, `tend_s` apart; the test ends all by leaving the context. What happened is read from the files that the
processes wrote (see `roles`), never asked of them.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, Self

from tests.faults.roles import main
from tests.faults.steady import RigPlan
from treepo_async.process import free_ports

TEND_S = 0.02
STOP_S = 10.0


class Progress(NamedTuple):
    """How far a run has come, as its actors and its learner were told."""

    accepted: int
    """Acknowledgements."""
    steps: int
    """Steps whose update is made."""


class Rig:
    """A run in a folder. Use as a context manager; `with` again on the same folder it is the run gone on with."""

    def __init__(self, folder: Path, plan: RigPlan) -> None:
        self.folder = folder
        self.plan = plan if plan.ports else replace(plan, ports={"replay": free_ports(1)[0]})
        self.roles = ["replay", *(f"actor-{i}" for i in range(plan.num_actors)), "learner"]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.faults.roles"])
        self._running: dict[str, BaseProcess] = {}
        self._former: list[BaseProcess] = []
        self._held: set[str] = set()
        self._over = threading.Event()
        self._files: dict[Path, tuple[int, list[dict[str, object]]]] = {}
        self._watcher = threading.Thread(target=self._tend, name="rig", daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text("{}")
        (self.folder / "plan.json").write_text(self.plan.to_json())
        for role in self.roles:
            self._start(role)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()
        # the learner's rank dies with its parent
        processes = [*self._former, *self._running.values()]
        for process in processes:
            process.kill()
        for process in processes:
            process.join(STOP_S)

    # ---------------------------------------------------------------- faults

    def pid_of(self, role: str) -> int:
        """The newest process of a role, or the learner's `rank`."""
        if role != "rank":
            return self._running[role].pid or 0
        return [int(str(row["pid"])) for row in self.rows("pids.jsonl") if row["role"] == "rank"][
            -1
        ]

    def kill(self, role: str) -> None:
        """SIGKILL; the rig, or for a `rank` its parent, starts it again."""
        os.kill(self.pid_of(role), signal.SIGKILL)

    def freeze(self, role: str) -> int:
        """SIGSTOP. Gives the process, for `thaw`."""
        pid = self.pid_of(role)
        os.kill(pid, signal.SIGSTOP)
        return pid

    def thaw(self, pid: int) -> None:
        """SIGCONT."""
        os.kill(pid, signal.SIGCONT)

    def start_beside(self, role: str) -> BaseProcess:
        """A second process of a role, which takes the place of the first, that is not ended. Gives the first."""
        first = self._running[role]
        self._former.append(first)
        self._start(role)
        return first

    def hold(self, role: str) -> None:
        """Do not start it again when it dies."""
        self._held.add(role)

    def release(self, role: str) -> None:
        """Start it again if it is dead, and whenever it dies."""
        self._held.discard(role)

    # ---------------------------------------------------------------- what happened

    def progress(self) -> Progress:
        """How far the run has come."""
        acks = sum(len(self.rows(f"acks-{role}.jsonl")) for role in self.roles if "actor" in role)
        steps = max((int(str(row["step"])) + 1 for row in self.rows("trained.jsonl")), default=0)
        return Progress(acks, steps)

    def wait_for_progress(self, since: Progress, *, timeout_s: float, steps: int = 1) -> float:
        """Until a tree was accepted and `steps` steps were made since then. Gives the seconds; fails at the deadline."""
        return self.wait_until(
            lambda: _is_further(self.progress(), since, steps),
            f"progress beyond {since}",
            timeout_s=timeout_s,
        )

    def wait_until(self, holds: Callable[[], object], what: str, *, timeout_s: float) -> float:
        """Until it holds. Gives the seconds; fails at the deadline with the ends of all logs."""
        begin = time.monotonic()
        while not holds():
            if time.monotonic() - begin > timeout_s:
                raise AssertionError(f"waited {timeout_s} s for {what}: {self.progress()}\n{self}")
            time.sleep(0.01)
        return time.monotonic() - begin

    def settle(self) -> None:
        """What is on its way between processes arrives."""
        self.wait(0.2)

    def wait(self, seconds: float) -> None:
        """Let the run go on for a while."""
        time.sleep(seconds)

    def rows(self, name: str) -> list[dict[str, object]]:
        """Lines of one of the processes' files, as far as they are whole."""
        file = self.folder / name
        position, rows = self._files.setdefault(file, (0, []))
        if file.exists():
            with file.open("rb") as opened:
                opened.seek(position)
                data = opened.read()
            whole = data[: data.rfind(b"\n") + 1]
            rows += [json.loads(line) for line in whole.splitlines()]
            self._files[file] = (position + len(whole), rows)
        return rows

    def acks(self) -> list[dict[str, object]]:
        """What actors were told."""
        names = [role for role in self.roles if role.startswith("actor")]
        return [row for name in names for row in self.rows(f"acks-{name}.jsonl")]

    def __str__(self) -> str:
        logs = [self.folder / f"{role}.log" for role in self.roles]
        ends = [
            f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}"
            for log in logs
            if log.exists()
        ]
        return "\n".join(ends)

    # ---------------------------------------------------------------- inside

    def _start(self, role: str) -> None:
        process = self._context.Process(
            target=main, args=(str(self.folder), role), name=role, daemon=False
        )
        process.start()
        self._running[role] = process

    def _tend(self) -> None:
        while not self._over.wait(TEND_S):
            for role, process in list(self._running.items()):
                if not process.is_alive() and role not in self._held:
                    self._start(role)


def _is_further(found: Progress, since: Progress, steps: int) -> bool:
    return found.accepted > since.accepted and found.steps >= since.steps + steps
