"""Kills of the stand-alone actor and of its engine in the middle of a job, on the real engine and the tiny model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from treepo_async.wire.tree_file import TreeFile

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 60
SMALL = ("tree.width=8", "tree.max_depth=4", "concurrent_trees=2", f"limit={NUM_PROMPTS}")
START_S, RUN_S, GONE_S = 150, 120, 20

pytestmark = [pytest.mark.faults, pytest.mark.timeout(4 * START_S + RUN_S)]


class Job:
    """Starts of one job, one after the other."""

    def __init__(self, out):
        self.out = out
        self.process = None
        self.family = set()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "launch/actor.py", *SMALL, f"out={self.out}"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self

    def num_lines(self):
        return self.out.read_bytes().count(b"\n") if self.out.exists() else 0

    def wait_for_lines(self, number):
        deadline = time.monotonic() + START_S
        while self.num_lines() < number:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"{self.num_lines()} of {number} lines"
            time.sleep(0.02)
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def sglang(self):
        """The server, which the actor has started itself."""
        (server,) = psutil.Process(self.process.pid).children()
        return server.pid

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate(timeout=GONE_S)
        assert self.process.returncode == -signal.SIGKILL

    def wait_until_engine_is_gone(self):
        deadline = time.monotonic() + GONE_S
        while alive := [p for p in self.family if p.is_running() and p.status() != "zombie"]:
            assert time.monotonic() < deadline, f"left: {alive}"
            time.sleep(0.1)

    def end(self):
        text, _ = self.process.communicate(timeout=START_S + RUN_S)
        return self.process.returncode, text


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path / "trees.jsonl")
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.communicate()


def check_whole(job):
    file = TreeFile(job.out, vocab_size=384)
    ids = [file.tree(i).prompt.id for i in range(len(file))]
    assert sorted(ids) == sorted(f"tiny-train-{i}" for i in range(NUM_PROMPTS))


def test_an_actor_killed_three_times_gives_every_prompt_its_tree_once(job):
    for number in range(3):
        before = job.num_lines()
        job.start().wait_for_lines(before + 4)
        job.kill()
        job.wait_until_engine_is_gone()
        assert before + 4 <= job.num_lines() < NUM_PROMPTS, f"killed midway, start {number}"
    code, text = job.start().end()
    assert code == 0, text
    assert f"{NUM_PROMPTS} done, 0 skipped, 0 failed of {NUM_PROMPTS}" in text
    check_whole(job)


def test_a_killed_sglang_is_started_again_and_no_prompt_is_lost(job):
    job.start().wait_for_lines(4)
    os.kill(job.sglang(), signal.SIGKILL)
    code, text = job.end()
    assert code == 0, text
    assert "engine restarted: SGLang died" in text
    assert "1 engine restarts" in text
    check_whole(job)
    job.wait_until_engine_is_gone()


def test_ctrl_c_ends_it_within_seconds_and_leaves_nothing(job):
    job.start().wait_for_lines(4)
    # as a terminal does, to every process of the foreground
    os.killpg(job.process.pid, signal.SIGINT)
    text, _ = job.process.communicate(timeout=GONE_S)
    assert job.process.returncode == 130, text
    assert "stopped;" in text
    assert "go on with: python launch/actor.py" in text
    job.wait_until_engine_is_gone()
