from dataclasses import replace

import numpy as np
import pytest

from tests.oracle import random_tree
from treepo_async.errors import DataError, WireError
from treepo_async.learner.ancestry import Ancestry
from treepo_async.learner.supply import Supply
from treepo_async.types import NO_LINEAGE, PolicyVersion
from treepo_async.wire.codec import encode_tree
from treepo_async.wire.messages import Ack, AskBatch, Batch

OLDEST, STEP, MAX_STALENESS = 5, 7, 2


def tree_of(version, *, seed=0):
    tree = random_tree(np.random.default_rng(seed))
    segments = tuple(replace(segment, policy_version=version) for segment in tree.segments)
    return replace(tree, segments=segments)


def supply_of(*answers, ancestry=None):
    """A supply whose replay gives these answers: (leases, trees, results)."""
    asked, given = [], iter(answers)

    def ask(message):
        asked.append(message)
        answer = next(given)
        if isinstance(answer, Ack):
            return answer, []
        leases, trees, results = answer
        frames = [frame for tree in trees for frame in encode_tree(tree)]
        per_tree = len(encode_tree(trees[0]))
        batch = Batch(
            step=message.step,
            lease_ids=leases,
            frames_per_tree=per_tree,
            ledger={"consumed": len(leases)},
            results=results,
        )
        return batch, frames

    supply = Supply(
        ask,
        lambda: None,
        ancestry or Ancestry(1),
        max_staleness=MAX_STALENESS,
        batch_timeout_s=5.0,
    )
    return supply, asked


def test_a_batch_is_asked_for_by_step_and_lineage_and_given_in_lease_order():
    trees = [tree_of(PolicyVersion(1, STEP), seed=seed) for seed in (1, 2)]
    supply, asked = supply_of((["a", "b"], trees, {0: "d"}))
    batch = supply.next(STEP)
    assert [(m.step, m.lineage) for m in asked] == [(STEP, 1)]
    assert isinstance(asked[0], AskBatch)
    assert (batch.lease_ids, batch.results, batch.ledger) == (["a", "b"], {0: "d"}, {"consumed": 2})
    for found, tree in zip(batch.trees, trees, strict=True):
        assert np.array_equal(found.rewards_L, tree.rewards_L, equal_nan=True)


def test_trees_come_under_the_names_of_the_lineage_that_trains():
    versions = [PolicyVersion(0, STEP), PolicyVersion(0, STEP - 1)]
    supply, _ = supply_of(
        (["a", "b"], [tree_of(v) for v in versions], {}), ancestry=Ancestry(1, {}, {0: STEP - 1})
    )
    found = [{s.policy_version for s in tree.segments} for tree in supply.next(STEP).trees]
    assert found == [{PolicyVersion(0, STEP)}, {PolicyVersion(1, STEP - 1)}]


@pytest.mark.parametrize("lineage", [0, 1])
def test_a_segment_older_than_the_bound_is_refused_by_lease_version_and_step(lineage):
    fits, too_old = (PolicyVersion(lineage, step) for step in (OLDEST, OLDEST - 1))
    supply, _ = supply_of(
        (["a", "b"], [tree_of(PolicyVersion(1, STEP)), tree_of(fits)], {}),
        (["c", "d"], [tree_of(PolicyVersion(1, STEP)), tree_of(too_old)], {}),
    )
    assert supply.next(STEP) is not None
    with pytest.raises(DataError, match=rf"lease d has a segment of policy version {lineage}\.4"):
        supply.next(STEP)


def test_a_batch_that_was_taken_before_keeps_the_bound_of_then():
    old = tree_of(PolicyVersion(0, 0))
    supply, _ = supply_of((["a"], [old], {0: ""}))
    assert supply.next(STEP) is not None


def test_trees_of_no_run_have_no_age():
    supply, _ = supply_of((["a"], [tree_of(PolicyVersion(NO_LINEAGE, 0))], {}))
    assert supply.next(STEP) is not None


def test_a_lease_that_was_trained_in_another_step_is_refused_until_that_is_retired():
    def batch(leases):
        return leases, [tree_of(PolicyVersion(1, STEP)) for _ in leases], {}

    supply, _ = supply_of(batch(["a", "b"]), batch(["a", "b"]), batch(["c", "b"]), batch(["b"]))
    supply.next(STEP)
    assert supply.next(STEP).lease_ids == ["a", "b"], "the same step again"
    with pytest.raises(DataError, match=r"lease b is in step 8, and was trained in step 7"):
        supply.next(STEP + 1)
    supply.retire(STEP)
    supply.next(STEP + 1)


def test_other_answers_and_batches_with_trees_missing_break_the_protocol():
    supply, _ = supply_of(Ack(), (["a", "b"], [tree_of(PolicyVersion(1, STEP))], {}))
    with pytest.raises(WireError, match="answered by Ack"):
        supply.next(STEP)
    with pytest.raises(WireError, match="a batch of 2 leases has 1 trees"):
        supply.next(STEP)
