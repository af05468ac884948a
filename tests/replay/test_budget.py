from dataclasses import dataclass

import pytest

from treepo_async.errors import TreepoError
from treepo_async.replay.budget import MANY, Budget
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules

RULES = QueueRules(
    prompts_per_batch=8,
    max_staleness=1,
    num_batches=9,
    lease_timeout_s=10.0,
    max_attempts=3,
    drop_degenerate=False,
    max_refills=0,
)


@dataclass
class Stored:
    num_bytes: int = 0
    largest: int = 0


@pytest.mark.parametrize(
    ("stored", "num_out", "fitting"),
    [(0, 0, 3), (0, 2, 1), (0, 3, 0), (0, 5, 0), (130, 1, 1), (131, 1, 0), (400, 0, 0)],
)
def test_as_many_leases_fit_as_trees_of_the_largest_size_beside_those_that_are_out(
    stored, num_out, fitting
):
    queue = Queue(RULES)
    for _ in range(num_out):
        queue.lease(0.0, "actor-0")
    budget = Budget(queue, Stored(stored, largest=100), max_bytes=330)
    assert budget.num_fitting() == fitting
    assert budget.has_room() == (fitting > 0)


def test_before_the_first_tree_leases_go_out_on_trust():
    budget = Budget(Queue(RULES), Stored(), max_bytes=1)
    assert budget.num_fitting() == MANY
    assert budget.has_room()


def test_a_prompt_whose_lease_was_given_up_keeps_its_place_and_the_run_goes_on():
    queue = Queue(RULES)
    first, _ = queue.lease(0.0, "actor-0"), queue.lease(0.0, "actor-0")
    queue.accept("000000001", 1, oldest_step=0, has_spread=True, is_scored=True)
    budget = Budget(queue, Stored(200, largest=100), max_bytes=200)
    assert not budget.has_room()
    queue.give_up(first.lease_id, 1, "reward timeout")
    assert budget.num_fitting() == 1
    budget.check()
    queue.lease(1.0, "actor-0")
    assert not budget.has_room()


def test_a_learner_that_waits_for_trees_without_room_ends_the_run():
    with pytest.raises(TreepoError, match="max_disk_bytes=200"):
        Budget(Queue(RULES), Stored(200, largest=100), max_bytes=200).check()
