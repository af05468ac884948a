"""Signals and kills in the middle of a run: it ends as it should, and leaves nothing behind."""

import json
import os
import signal

import pytest

SMALL = ("actors=2", "eval.every=0", "tree.width=8", "replay.prompts_per_batch=4")
START_S, END_S, GONE_S = 150, 60, 10

pytestmark = [pytest.mark.faults, pytest.mark.timeout(START_S + 2 * END_S)]


def started(launch, steps):
    run = launch(f"steps={steps}", *SMALL, "replay.lease_timeout_s=8")
    run.wait_for_line(f"/{steps}  reward", timeout_s=START_S)
    return run


def test_ctrl_c_ends_the_run_with_130_and_nothing_is_left(launch):
    run = started(launch, 500)
    run.signal_group(signal.SIGINT)
    run.wait_until_gone(timeout_s=GONE_S)
    assert run.wait(timeout_s=END_S) == 130, str(run)
    assert any("SIGINT: stopping" in line for line in run.lines)
    assert run.lines[-1].startswith("stopped; metrics:")
    assert run.errors == []


def test_a_killed_driver_takes_everything_with_it(launch):
    run = started(launch, 500)
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait_until_gone(timeout_s=GONE_S)
    assert run.wait(timeout_s=END_S) == -signal.SIGKILL


def test_a_killed_learner_ends_the_run_and_is_named(launch):
    run = started(launch, 500)
    os.kill(run.pid_of("learner-0"), signal.SIGKILL)
    assert run.wait(timeout_s=END_S) == 1
    assert "error: learner-0 was killed by SIGKILL" in run.errors
    assert run.errors[-1] == f"logs: {run.run_dir / 'logs'}"
    run.wait_until_gone(timeout_s=GONE_S)


def test_a_killed_actor_is_replaced_and_the_run_does_all_its_steps(launch):
    steps = 8
    run = started(launch, steps)
    os.kill(run.pid_of("actor-1"), signal.SIGKILL)
    assert run.wait(timeout_s=2 * END_S) == 0, str(run)
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, steps + 1))
    assert any("actor-1 was killed by SIGKILL; starting it again" in line for line in run.lines)
    run.wait_until_gone(timeout_s=GONE_S)
