"""A run of `launch/run.py` as a person starts it, for the tests that need the whole of it; and one Megatron process group."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, settings

from tests.memory import FamilyMemory
from treepo_async.process import free_ports

# how long an example takes on a busy machine says nothing about it
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parents[1]
NOMINAL_START_S = 30.0
"""From launch to the first step on an idle machine of two cores."""


class LaunchedRun:
    """A run in a session of its own: its lines as they come, and every process that it was seen to have."""

    def __init__(self, words, run_dir):
        self.run_dir = run_dir
        self.lines, self.errors = [], []
        self.began = time.monotonic()
        self.start_s = self.seconds = None
        self.process = subprocess.Popen(
            [sys.executable, "launch/run.py", *words, f"run_dir={run_dir}"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._driver = psutil.Process(self.process.pid)
        self._family = {self._driver}
        self.memory = None
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def wait_for_line(self, part, *, timeout_s):
        """The first line with `part`; fails at the deadline or when the run ends without it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = [line for line in self.lines if part in line]
            if found:
                self.start_s = self.start_s or time.monotonic() - self.began
                self.see_family()
                return found[0]
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self}"
            time.sleep(0.1)
        raise AssertionError(f"no line with {part!r} after {timeout_s} s:\n{self}")

    def wait(self, *, timeout_s):
        """The exit code, once it has ended and said all it had to say."""
        code = self.process.wait(timeout_s)
        self.seconds = time.monotonic() - self.began
        self._end_watch()
        for reader in self._readers:
            reader.join(timeout=10)
        return code

    def see_family(self):
        """Remember every process that descends from the driver now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._family |= set(self._driver.children(recursive=True))

    def watch_memory(self):
        """Have `memory` tell what the driver and all that descends from it take."""
        self.memory = FamilyMemory(self._members)

    def events(self, kind):
        """Those of a kind in its event log, oldest first."""
        file = self.run_dir / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def pid_of(self, role):
        """The newest process of a role, e.g. `actor-1`."""
        return [event["pid"] for event in self.events("started") if event["role"] == role][-1]

    def pid_of_rank(self, number):
        """The newest process of a rank of the learner."""
        return [event["pid"] for event in self.events("rank") if event["rank"] == number][-1]

    def pid_of_sglang(self):
        """The server that the first engine host started."""
        (server,) = psutil.Process(self.pid_of("engine-0")).children()
        return server.pid

    def num_seen(self):
        return len(self._family)

    def alive(self):
        """Processes of the run that still are."""
        return [p for p in self._family if _is_alive(p)]

    def wait_until_gone(self, *, timeout_s):
        """Seconds until nothing of the run was left; the deadline grows with the slowness of the machine."""
        begin = time.monotonic()
        deadline = begin + timeout_s * max(1.0, (self.start_s or 0.0) / NOMINAL_START_S)
        while self.alive():
            left = [str(process) for process in self.alive()]
            assert time.monotonic() < deadline, f"left after {timeout_s} s: {left}"
            time.sleep(0.1)
        return time.monotonic() - begin

    def clean_up(self):
        """Kill what is left."""
        self._end_watch()
        self.see_family()
        for process in self.alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=10)

    def signal_group(self, number):
        """What a terminal does on Ctrl-C: signal every process of the foreground group."""
        os.killpg(self.process.pid, number)

    def __str__(self):
        # the first line of an error names its cause, the last ones are a log's end
        return "\n".join([*self.lines[-15:], *self.errors[:2], "...", *self.errors[-60:]])

    def _end_watch(self):
        if self.memory is not None:
            self.memory.end()

    def _members(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self._driver, *self._driver.children(recursive=True)]
        return []

    def _read(self, pipe, lines):
        for line in pipe:
            self.see_family()
            lines.append(line.rstrip("\n"))


def _is_alive(process):
    # psutil tells a process from a later one with its pid by their creation times
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """`launch(*words)` starts a run in a new folder, or in that of another run; what is left of it is killed."""
    runs = []

    def start(*words, run_dir=None):
        runs.append(LaunchedRun(words, run_dir or tmp_path_factory.mktemp("run") / "run"))
        return runs[-1]

    yield start
    for run in runs:
        run.clean_up()


@pytest.fixture(scope="session")
def groups():
    """A world of one rank, open until the last test has run."""
    from treepo_async.config.layout import Layout
    from treepo_async.learner.groups import close_groups, open_groups

    (port,) = free_ports(1)
    open_groups(Layout(), rank=0, address=f"127.0.0.1:{port}", timeout_s=30.0)
    yield
    close_groups()
