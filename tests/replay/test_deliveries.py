"""Which versions a tree may claim to be sampled under, as replay knows of them."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from tests.oracle import random_tree
from treepo_async.errors import RefusedError, WireError
from treepo_async.replay.deliveries import Deliveries
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.state import QueueState
from treepo_async.types import PolicyVersion
from treepo_async.wire.codec import digest_of, encode_tree
from treepo_async.wire.messages import PutTree

RULES = QueueRules(
    prompts_per_batch=2,
    max_staleness=100,
    num_batches=100,
    lease_timeout_s=10.0,
    max_attempts=3,
    drop_degenerate=False,
    max_refills=0,
)


@dataclass
class Shelf:
    """A store and a group in one, both empty."""

    trees: dict = field(default_factory=dict)

    def digest_of(self, _):
        return None

    def add(self, tree):
        self.trees[tree.lease_id] = tree


def delivered(version, attempt=1, lineages=((0, 5), (1, 3))):
    """What becomes of a tree of a version, when lineage 0 was heard of at step 5 and lineage 1 began at step 3."""
    queue = Queue.of(RULES, QueueState(), now=0.0)
    queue.steps.lineages, queue.published = dict(lineages), 5
    entry = queue.lease(0.0, "actor-0")
    tree = random_tree(np.random.default_rng(0), versions=[version])
    frames = encode_tree(
        replace(tree, provenance=replace(tree.provenance, lease_id=entry.lease_id))
    )
    shelf = Shelf()
    deliveries = Deliveries(queue, shelf, shelf, vocab_size=128, max_bytes=2**20)
    message = PutTree(lease_id=entry.lease_id, attempt=attempt, digest=digest_of(frames))
    return deliveries.take(message, frames)


@pytest.mark.parametrize("version", [(0, 0), (0, 5), (0, 6), (1, 4), (1, 6), (2, 3)])
def test_a_version_that_may_be_published_is_taken(version):
    """0.6 is what lineage 0 published, and was killed before it said so; 2.3 is the first of a lineage unheard of."""
    assert delivered(PolicyVersion(*version)) == "accepted"


@pytest.mark.parametrize("version", [(0, 7), (1, 7), (2, 7), (3, 0)])
def test_a_version_that_cannot_be_there_yet_is_refused(version):
    with pytest.raises(RefusedError, match="future_version") as refused:
        delivered(PolicyVersion(*version))
    assert not refused.value.retry


def test_a_lineage_that_was_killed_before_its_first_word_may_have_published_one_step():
    lineages = ((0, 5), (2, 5))
    assert delivered(PolicyVersion(1, 6), lineages=lineages) == "accepted"
    with pytest.raises(RefusedError, match="future_version"):
        delivered(PolicyVersion(1, 7), lineages=lineages)


@pytest.mark.parametrize("attempt", [-1, 0, 2, 2**63])
def test_a_tree_of_an_attempt_that_never_was_is_invalid(attempt):
    with pytest.raises(WireError, match="attempts 1 to 1"):
        delivered(PolicyVersion(0, 5), attempt=attempt)
