"""The command of the README's first lines, on two engines: every process of it is there and has its part."""

import json

import pytest

STEPS, NUM_ACTORS, NUM_RANKS = 2, 8, 8
WORDS = ("actors=8", "learner=tp4pp2", f"steps={STEPS}", "engines=2", "eval.every=0")
RUN_S = 300

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 30)]


@pytest.fixture(scope="module")
def run(launch):
    started = launch(*WORDS)
    assert started.wait(timeout_s=RUN_S) == 0, str(started)
    return started


@pytest.fixture(scope="module")
def steps(run):
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_all_steps_are_done_and_engine_and_learner_agree(steps):
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    gaps = [step[f"gap/{kind}"] for step in steps for kind in ("probe_max", "sampled_max")]
    assert max(gap for gap in gaps if gap is not None) < 1e-4


def test_every_actor_is_a_process_that_finished_a_lease(steps):
    actors = {f"actor-{i}" for i in range(NUM_ACTORS)}
    finished = steps[-1]["leases_by_actor"]
    assert finished.keys() == actors
    assert min(finished.values()) >= 1
    assert len({steps[-1]["pids"][actor] for actor in actors}) == NUM_ACTORS


def test_every_rank_is_a_process(steps):
    pids = steps[-1]["pids"]
    ranks = {pids[f"learner-0/rank-{i}"] for i in range(NUM_RANKS)}
    assert len(ranks | {pids["learner-0"]}) == NUM_RANKS + 1


def test_each_engine_takes_a_version_once(run):
    applied = [(event["role"], event["version"]) for event in run.events("weights")]
    assert len(applied) == len(set(applied))
    assert {engine for engine, _ in applied} == {"engine-0", "engine-1"}
    assert ("engine-0", f"0.{STEPS}") in applied


def test_nothing_of_the_run_is_left(run):
    assert run.num_seen() > NUM_ACTORS + NUM_RANKS
    assert run.alive() == []
