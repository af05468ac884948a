"""Signals and kills in the middle of a run: it ends as it should, loses no lease, and leaves nothing behind."""

import json
import os
import signal
import time
from collections import Counter

import pytest

from treepo_async.cluster.verify import verify_run
from treepo_async.replay.entry import State
from treepo_async.replay.index import Index
from treepo_async.weights.checkpoints import CheckpointStore

BATCH, MAX_STALENESS = 4, 1
SMALL = ("actors=2", "eval.every=0", "tree.width=8", f"replay.prompts_per_batch={BATCH}")
START_S, END_S, GONE_S = 150, 60, 10
RESTART_S = 60
"""A role or all ranks started again: imports, and SGLang's start."""
NOTICE_S = 30
MANY = 500
"""Steps of a run that is not meant to do them all."""

pytestmark = [pytest.mark.faults, pytest.mark.timeout(START_S + RESTART_S + 2 * END_S)]


def started(launch, steps, *words, at=1):
    """A run that has done `at` steps."""
    run = launch(f"steps={steps}", *SMALL, *words, "replay.lease_timeout_s=8")
    number = str(at).rjust(len(str(steps)))
    run.wait_for_line(f"step {number}/{steps}  reward", timeout_s=START_S)
    return run


def kill(pid):
    os.kill(pid, signal.SIGKILL)


def records(run):
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def newest_checkpoint(run):
    """The step that it is of."""
    return CheckpointStore(run.run_dir / "checkpoints", keep=2).versions()[-1].step


def steps_of_lineage(run, number):
    return [record["step"] for record in records(run) if record["learner/lineage"] == number]


def check_whole(run, steps, *, untold=frozenset()):
    """All steps are done, each trained on trees within the bound, and every lease came to its end.

    `untold` are steps whose records died with a driver.
    """
    assert run.wait(timeout_s=RESTART_S + 2 * END_S) == 0, str(run)
    done = records(run)
    assert {record["step"] for record in done} | untold == set(range(1, steps + 1))
    assert max(record["staleness/max"] for record in done) <= MAX_STALENESS
    assert [verdict.line() for verdict in verify_run(run.run_dir) if not verdict.holds] == []
    index = Index.open(run.run_dir / "replay" / "index.sqlite")
    states = Counter(row.state for row in index.leases())
    assert states.pop(State.TRAINED) == steps * BATCH
    assert states.keys() <= {State.DROPPED}, "none was given up, and none is left"
    assert not any("differ" in line for line in run.lines), "no alarm of log-probs"
    run.wait_until_gone(timeout_s=GONE_S)


def test_ctrl_c_ends_the_run_with_130_and_nothing_is_left(launch):
    run = started(launch, MANY)
    run.signal_group(signal.SIGINT)
    run.wait_until_gone(timeout_s=GONE_S)
    assert run.wait(timeout_s=END_S) == 130, str(run)
    assert any("SIGINT: stopping" in line for line in run.lines)
    assert run.lines[-1].startswith("stopped; metrics:")
    assert run.errors == []


def test_a_killed_driver_takes_everything_with_it_and_the_run_goes_on_from_its_checkpoint(launch):
    run = started(launch, MANY, "checkpoint.every=2", at=5)
    kill(run.process.pid)
    run.wait_until_gone(timeout_s=GONE_S)
    assert run.wait(timeout_s=END_S) == -signal.SIGKILL
    told = records(run)[-1]["step"]
    # its learner may have gone on for a while
    at = newest_checkpoint(run)
    steps = at + 3
    again = launch(f"steps={steps}", run_dir=run.run_dir)
    again.wait_for_line(f"resumed at step {at})", timeout_s=START_S)
    check_whole(again, steps, untold=set(range(told + 1, at + 1)))
    assert steps_of_lineage(run, 1) == list(range(at + 1, steps + 1))


@pytest.mark.parametrize(
    ("role", "at"), [("actor-1", 1), ("engine-0", 1), ("learner-0", 4), ("replay-0", 2)]
)
def test_a_killed_role_is_started_again_and_the_run_does_all_its_steps(launch, role, at):
    steps = 8
    run = started(launch, steps, "checkpoint.every=3", at=at)
    kill(run.pid_of(role))
    check_whole(run, steps)
    if role == "replay-0":
        # what was on disk at the kill was not grown again; of the last commit, which has the trees of open leases
        # at most (two batches with a staleness of 1), the kill may have cut off the telling
        grown = sum(r["trees/accepted"] for r in records(run) if "trees/accepted" in r)
        assert (steps - 2) * BATCH <= grown <= steps * BATCH
    assert any(f"{role} was killed by SIGKILL; starting it again" in line for line in run.lines)


def test_a_killed_sglang_is_started_again_by_its_host(launch):
    steps = 8
    run = started(launch, steps)
    kill(run.pid_of_sglang())
    check_whole(run, steps)
    assert any("ALARM engine-0: engine restarted" in line for line in run.lines)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_is_noticed_and_all_ranks_go_on_from_their_checkpoint(launch, rank):
    steps, every = 10, 3
    run = started(launch, steps, "learner=tp2", f"checkpoint.every={every}", at=5)
    saved = newest_checkpoint(run)
    killed, began = run.pid_of_rank(rank), time.monotonic()
    kill(killed)
    run.wait_for_line("the learner's ranks are started again", timeout_s=NOTICE_S)
    assert time.monotonic() - began < NOTICE_S
    check_whole(run, steps)
    starts = run.events("rank")
    assert [event["rank"] for event in starts].count(rank) == 2
    assert run.pid_of_rank(rank) != killed
    versions = {event["version"].partition(".")[0] for event in run.events("saved")}
    assert versions == {"0", "1"}, "what came after is of a lineage of its own"
    again = steps_of_lineage(run, 1)
    # one more checkpoint may have been made before the kill
    assert again[0] - 1 in (saved, saved + every)
    assert again == list(range(again[0], steps + 1))
