"""Processes that are stopped for a while and then go on as if nothing had happened, while others have taken their place."""

import pytest

from tests.faults.rig import Rig
from tests.faults.soak import failures_of, outcome_of
from tests.faults.steady import RigPlan

PLAN = RigPlan(num_actors=2, tree_s=0.1, step_s=0.01, lease_timeout_s=0.8, resend_s=0.3)
WAIT_S = 30.0

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.fixture
def rig(tmp_path):
    """A run at work; in the end it must be as if nothing had happened."""
    with Rig(tmp_path, PLAN) as rig:
        rig.wait_until(lambda: rig.progress().steps >= 2, "two steps", timeout_s=WAIT_S)
        yield rig
    found = outcome_of(rig)
    assert found.is_whole, found
    assert failures_of(rig) == []


def goes_on(rig, steps=3):
    """The run makes that many more steps."""
    rig.wait_for_progress(rig.progress(), timeout_s=WAIT_S, steps=steps)


def test_leases_of_a_frozen_actor_go_to_the_others_and_it_works_on_when_it_wakes(rig):
    frozen = rig.freeze("actor-0")
    goes_on(rig)
    told = len(rig.rows("acks-actor-0.jsonl"))
    rig.thaw(frozen)
    rig.wait_until(
        lambda: len(rig.rows("acks-actor-0.jsonl")) > told, "actor-0 to work", timeout_s=WAIT_S
    )
    goes_on(rig)


def test_a_frozen_actor_whose_place_is_taken_is_fenced_when_it_wakes(rig):
    frozen = rig.freeze("actor-0")
    first = rig.start_beside("actor-0")
    goes_on(rig)
    rig.thaw(frozen)
    rig.wait_until(lambda: not first.is_alive(), "the former actor to end", timeout_s=WAIT_S)
    assert "fenced" in (rig.folder / "actor-0.log").read_text()
    goes_on(rig)


@pytest.mark.parametrize("role", ["replay", "rank"])
def test_a_frozen_part_holds_the_learner_up_and_nothing_is_lost_when_it_wakes(rig, role):
    frozen = rig.freeze(role)
    rig.settle()
    steps = rig.progress().steps
    rig.wait(PLAN.lease_timeout_s + 0.4)
    assert rig.progress().steps == steps
    rig.thaw(frozen)
    goes_on(rig)


def test_a_frozen_learner_whose_place_is_taken_commits_nothing_when_it_wakes(rig):
    frozen = rig.freeze("rank")
    first = rig.start_beside("learner")
    goes_on(rig)
    rig.thaw(frozen)
    rig.wait_until(lambda: not first.is_alive(), "the former learner to end", timeout_s=WAIT_S)
    log = (rig.folder / "learner.log").read_text()
    # by replay, or by the folder of publications, whichever it comes to first
    assert "fenced" in log or "was rolled back" in log
    goes_on(rig)
    lineages = [row["lineage"] for row in rig.rows("trained.jsonl")]
    begun = lineages.index(1)
    assert lineages[begun + 1 :].count(0) <= 1, "what it had at hand, and no more"
