"""Kills of the stand-alone actor and of its engine in the middle of a job, on the real engine and the tiny model."""

import os
import signal

import pytest

from tests.faults.audit import audit
from tests.faults.job import GONE_S, RUN_S, START_S, Job

NUM_PROMPTS = 60
SMALL = ("tree.width=8", "tree.max_depth=4", "concurrent_trees=2", f"limit={NUM_PROMPTS}")

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3 * START_S + RUN_S)]


@pytest.fixture
def job(tmp_path):
    made = Job(tmp_path / "trees.jsonl", SMALL)
    yield made
    made.close()


def check_whole(job):
    ids = [f"tiny-train-{i}" for i in range(NUM_PROMPTS)]
    found = audit(job.out, ids, vocab_size=384)
    assert (found.num_trees, found.wrong) == (NUM_PROMPTS, [])


def test_an_actor_killed_three_times_gives_every_prompt_its_tree_once(job):
    for number in range(3):
        before = job.num_ended()
        job.start().wait_for(before + 4)
        job.kill()
        job.wait_until_gone()
        assert before + 4 <= job.num_ended() < NUM_PROMPTS, f"killed midway, start {number}"
    code, text = job.start().end()
    assert code == 0, text
    assert f"{NUM_PROMPTS} done, 0 skipped, 0 failed of {NUM_PROMPTS}" in text
    check_whole(job)


def test_a_killed_sglang_is_started_again_and_no_prompt_is_lost(job):
    job.start().wait_for(4)
    os.kill(job.sglang(), signal.SIGKILL)
    code, text = job.end()
    assert code == 0, text
    assert "engine restarted: SGLang died" in text
    assert "1 engine restarts" in text
    check_whole(job)
    job.wait_until_gone()


def test_ctrl_c_ends_it_within_seconds_and_leaves_nothing(job):
    job.start().wait_for(4)
    # as a terminal does, to every process of the foreground
    os.killpg(job.process.pid, signal.SIGINT)
    code, text = job.end(timeout_s=GONE_S)
    assert code == 130, text
    assert "stopped;" in text
    assert "go on with: python launch/actor.py" in text
    job.wait_until_gone()
