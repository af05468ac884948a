"""Starts of one job of the stand-alone actor, one after the other: each begun, watched, and killed or waited for.

Waits: for prompts to end (`START_S` without one), for the end (`RUN_S`), for killed processes to be gone (`GONE_S`).
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

from treepo_async.actor.output import beside

ROOT = Path(__file__).resolve().parents[2]
START_S, RUN_S, GONE_S = 150.0, 270.0, 20.0
POLL_S = 0.05


class JobError(Exception):
    """A start did other than it was to do."""


class Job:
    """All starts of one job."""

    def __init__(self, out: Path, words: Sequence[str]) -> None:
        """Nothing begins yet.

        Args:
            out: file of the trees, as lines.
            words: of the command line, without `out`.
        """
        self.out, self.words = out, [*words, f"out={out}"]
        self.log_file = beside(out, "log")
        """What the last start said."""
        self._process: subprocess.Popen[bytes] | None = None
        self._family: set[psutil.Process] = set()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The actor of the last start."""
        assert self._process is not None, "it was started"
        return self._process

    def start(self) -> "Job":
        """Begin, or go on."""
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "launch/actor.py", *self.words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def num_ended(self) -> int:
        """Prompts with a tree, and those that ended without one."""
        files = (self.out, beside(self.out, "failed.jsonl"))
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def wait_for(self, number: int) -> None:
        """Return once so many prompts have ended, while the actor is at work.

        Raises:
            JobError: it ended before, or a deadline passed without a prompt that did.
        """
        ended, deadline = self.num_ended(), time.monotonic() + START_S
        while ended < number:
            if self.process.poll() is not None:
                raise JobError(f"ended after {ended} of {number} prompts: {self.text()}")
            if time.monotonic() > deadline:
                raise JobError(f"{ended} of {number} prompts and no more: {self.text()}")
            time.sleep(POLL_S)
            if (found := self.num_ended()) > ended:
                ended, deadline = found, time.monotonic() + START_S
        self._family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def sglang(self) -> int:
        """The server's pid; the actor has started it itself."""
        (server,) = psutil.Process(self.process.pid).children()
        return int(server.pid)

    def kill(self) -> None:
        """Kill the actor alone; its engine must find out by itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self._reap()

    def crash(self) -> None:
        """Kill all of it at once, as when the machine goes down."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        kill_all(family)
        self._family |= set(family)
        self._reap()

    def wait_until_gone(self) -> None:
        """Return once no process is left that was seen to belong to a start.

        Raises:
            JobError: some are left.
        """
        deadline = time.monotonic() + GONE_S
        while alive := [p for p in self._family if _is_alive(p)]:
            if time.monotonic() > deadline:
                raise JobError(f"left after {GONE_S:g} s: {alive}")
            time.sleep(POLL_S)

    def end(self, *, timeout_s: float = RUN_S) -> tuple[int, str]:
        """Wait for the end. Gives exit code and output.

        Raises:
            JobError: it did not come.
        """
        try:
            code = self.process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise JobError(f"goes on after {timeout_s:g} s: {self.text()}") from error
        return code, self.text()

    def text(self) -> str:
        """What the last start has said until now."""
        return self.log_file.read_text()

    def close(self) -> None:
        """Leave nothing behind. An actor that ends by itself meanwhile is as good as a killed one here."""
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(JobError):
                self.crash()

    def _reap(self) -> None:
        code = self.process.wait(timeout=GONE_S)
        if code != -signal.SIGKILL:
            raise JobError(f"was not killed, but ended by itself with {code}: {self.text()}")


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Kill all that are still there: who is not our child may be reaped at any time."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
