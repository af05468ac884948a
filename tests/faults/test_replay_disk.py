"""A process that commits is killed at each place of a commit, or its disk refuses: what it said `ack` to is there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.replay.journal import comparable
from tests.replay.life import SEGMENT_BYTES, Life, check_same
from treepo_async.chaos import PLAN_VARIABLE
from treepo_async.replay.segments import segments_of
from treepo_async.replay.store import Store

ROOT = Path(__file__).resolve().parents[2]
END_S = 60
NUMBER = 40
"""Commits of a life."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(2 * END_S)]


class Committer:
    """The process, and what it said."""

    def __init__(self, folder, seed, points):
        self.folder, self.seed = folder, seed
        plan = folder.parent / "plan.json"
        plan.write_text(json.dumps({"log": str(folder.parent / "chaos.log"), "points": points}))
        self._environment = {**os.environ, PLAN_VARIABLE: str(plan)}
        self.acked = -1
        self.lines = []

    def run(self):
        """Once, until it ends. Gives its exit status."""
        words = ["-m", "tests.faults.committer", str(self.folder), str(self.seed), str(NUMBER)]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=END_S,
            check=False,
        )
        self.lines = [line for line in done.stdout.splitlines() if line.startswith(("ack", "no"))]
        acks = [int(line.split()[1]) for line in self.lines if line.startswith("ack")]
        assert acks == [*range(acks[0], acks[0] + len(acks))] if acks else True
        self.acked = max([self.acked, *acks])
        return done.returncode

    def injected(self):
        """What was done to it."""
        log = self.folder.parent / "chaos.log"
        return [line.split()[:2] for line in log.read_text().splitlines()]

    def check(self):
        """The store is that of the last commit acknowledged, or of the next."""
        commits = Life(self.seed).commits(self.acked + 2)
        store, state = Store.open(self.folder, "run", resume_step=None, segment_bytes=SEGMENT_BYTES)
        at = self.acked
        if at < 0 or comparable(state) != comparable(commits[at].state):
            at += 1
        check_same(store, state, commits[at])
        store.close()
        return at


@pytest.mark.parametrize(
    ("point", "is_ahead"),
    [
        ("replay.before_sync", True),  # a kill spares what the system has in memory
        ("replay.after_sync", True),
        ("replay.after_index", True),
        ("committer.after_ack", False),
        ("replay.write", False),
    ],
)
def test_a_process_killed_in_a_commit_loses_nothing_it_acknowledged(tmp_path, point, is_ahead):
    rule = {"act": "kill", "hit": 12, "times": 2}
    committer = Committer(tmp_path / "replay", 1, {point: rule})
    for _ in range(2):
        before = committer.acked
        assert committer.run() == -signal.SIGKILL
        assert committer.acked > before, "it went on"
        assert committer.check() == committer.acked + is_ahead
    assert committer.run() == 0
    assert (committer.acked, committer.check()) == (NUMBER - 1, NUMBER - 1)
    assert committer.injected() == [[point, "kill"]] * 2


@pytest.mark.parametrize("act", ["enospc", "eio"])
@pytest.mark.parametrize("point", ["replay.write", "replay.before_sync", "replay.after_sync"])
def test_a_disk_that_refuses_gets_no_ack_and_the_commit_succeeds_once_it_can(tmp_path, point, act):
    rule = {"act": act, "hit": 10, "times": 3}
    committer = Committer(tmp_path / "replay", 2, {point: rule})
    assert committer.run() == 0
    refused = [line for line in committer.lines if line.startswith("no")]
    assert len(refused) == 3
    at = committer.lines.index(refused[0])
    assert committer.lines[at + 3] == refused[0].replace("no", "ack"), "the same commit"
    assert committer.check() == NUMBER - 1
    assert not (tmp_path / "replay" / "quarantine").exists(), "index and log are whole"


def test_a_process_killed_while_the_disk_refuses_has_promised_nothing(tmp_path):
    points = {
        "replay.after_sync": {"act": "enospc", "hit": 10, "times": 1000},
        "replay.before_sync": {"act": "kill", "hit": 14},
    }
    committer = Committer(tmp_path / "replay", 3, points)
    assert committer.run() == -signal.SIGKILL
    assert [line for line in committer.lines if line.startswith("no")]
    assert committer.check() >= committer.acked
    (tmp_path / "plan.json").write_text('{"log": "none", "points": {}}')
    assert committer.run() == 0
    assert committer.check() == NUMBER - 1


@pytest.mark.parametrize("hit", [1, 2, 3])
def test_a_process_killed_at_its_very_first_writes_begins_anew(tmp_path, hit):
    committer = Committer(tmp_path / "replay", 5, {"replay.write": {"act": "kill", "hit": hit}})
    assert committer.run() == -signal.SIGKILL
    assert committer.acked == -1
    assert committer.run() == 0
    assert committer.check() == NUMBER - 1


def test_writes_that_the_system_takes_in_parts_are_whole(tmp_path):
    committer = Committer(tmp_path / "replay", 4, {"replay.write": {"act": "short", "times": 60}})
    assert committer.run() == 0
    assert committer.check() == NUMBER - 1
    assert segments_of(tmp_path / "replay" / "log")[-1] > 1
