"""A short soak, and what it would say of a replay that acknowledges too early."""

import pytest

from tests.faults.rig import Rig
from tests.faults.soak import failures_of, outcome_of, soak
from tests.faults.steady import RigPlan

QUICK = RigPlan(tree_s=0.1, step_s=0.01, resend_s=0.3, prompts_per_batch=2, save_every=8)
KILLS = 8
WAIT_S = 30.0

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


def test_kills_at_random_lose_no_tree_train_none_twice_and_change_no_step(tmp_path):
    found = soak(tmp_path, QUICK, kills=KILLS, seed=2, mean_s=0.1, twin_s=0)
    assert found.outcome.is_whole, found
    assert found.failures == []
    assert found.num_kills == KILLS
    assert {*found.recoveries} == {"actor", "replay", "rank", "learner"}, "each kind was killed"
    assert found.outcome.num_updates > found.outcome.num_steps, "some steps were done again"


@pytest.mark.parametrize(("dies", "loses"), [("acks_last", False), ("acks_first", True)])
def test_trees_are_lost_only_where_replay_acknowledges_before_it_commits(tmp_path, dies, loses):
    plan = RigPlan(tree_s=0.1, step_s=0.01, resend_s=0.3, dies=dies)
    with Rig(tmp_path, plan) as rig:
        rig.wait_until((tmp_path / "died").exists, "its death", timeout_s=WAIT_S)
        rig.wait_for_progress(rig.progress(), timeout_s=WAIT_S, steps=2)
        assert failures_of(rig) == [], "while it is at work"
    found = outcome_of(rig)
    assert bool(found.lost) is loses, found
    assert (found.twice, found.other) == ([], [])
    assert failures_of(rig) == []
