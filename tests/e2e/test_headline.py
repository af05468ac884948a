"""The command of the README's first lines: every process of it is there and has its part, and it stays within a laptop."""

import sys
from pathlib import Path

import pytest

from tests.e2e.headline import (
    MOST_GIB,
    NUM_ACTORS,
    NUM_RANKS,
    RUN_S,
    STEPS,
    WORDS,
    account_of,
    steps_of,
)

README = Path(__file__).resolve().parents[2] / "README.md"

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 30)]


@pytest.fixture(scope="module")
def run(launch):
    started = launch(*WORDS)
    started.watch_memory()
    assert started.wait(timeout_s=RUN_S) == 0, str(started)
    return started


@pytest.fixture(scope="module")
def steps(run):
    return steps_of(run)


def test_the_command_is_the_readmes():
    assert f"python launch/run.py {' '.join(WORDS)}\n" in README.read_text()


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


def test_one_engine_serves_all_and_the_first_and_the_last_weights_are_evaluated(run):
    assert {event["role"] for event in run.events("weights")} == {"engine-0"}
    assert [event["step"] for event in run.events("eval")] == [0, STEPS]


def test_its_processes_fit_into_the_memory_of_a_laptop(run, capsys):
    with capsys.disabled():
        sys.stdout.write(f"\n{account_of(run)}\n")
    # a rank alone has more than this
    assert NUM_RANKS * 0.1 < run.memory.most_gib < MOST_GIB


def test_nothing_of_the_run_is_left(run):
    assert run.num_seen() > NUM_ACTORS + NUM_RANKS
    assert run.alive() == []
