"""A queue that is driven at random, the same way for the same seed, and what a store must give back after each commit."""

import random
from typing import NamedTuple

from tests.replay.journal import comparable
from treepo_async.replay.entry import State
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.state import Changes, QueueState
from treepo_async.replay.store import NewTree

SEGMENT_BYTES = 4096
RULES = QueueRules(
    prompts_per_batch=2,
    max_staleness=6,
    num_batches=1000,
    lease_timeout_s=60.0,
    max_attempts=2,
    drop_degenerate=True,
    max_refills=4,
)


class Commit(NamedTuple):
    """One group, and where the queue stands after it."""

    changes: Changes | None
    trees: list[NewTree]
    forgotten: list[str]
    state: QueueState
    kept: dict[str, NewTree]
    """Trees that must be readable."""


class Life:
    """The commits of a queue, one after the other."""

    def __init__(self, seed=0, *, tree_bytes=300):
        self.queue = Queue.of(RULES, QueueState(), now=0.0)
        self._random = random.Random(seed)
        self._tree_bytes = tree_bytes
        self._kept = {}

    def commit(self):
        """Some things happen; they are one group."""
        trees, forgotten = [], []
        for _ in range(self._random.randint(1, 6)):
            self._grow(trees)
            self._learn(forgotten)
        self._kept |= {tree.lease_id: tree for tree in trees}
        for lease_id in forgotten:
            self._kept.pop(lease_id, None)
        return Commit(
            self.queue.take_changes(), trees, forgotten, self.queue.state(), dict(self._kept)
        )

    def commits(self, number):
        return [self.commit() for _ in range(number)]

    def _grow(self, trees):
        act = self._random.random()
        if self.queue.may_lease("a") and act < 0.6:
            self.queue.lease(0.0, "a")
        leased = [e for e in self.queue.order.live.values() if e.state is State.LEASED]
        if not leased:
            return
        entry = self._random.choice(leased)
        if act < 0.1:
            self.queue.give_up(entry.lease_id, entry.attempt, "invalid")
        elif act < 0.8:
            outcome = self.queue.accept(
                entry.lease_id,
                entry.attempt,
                oldest_step=self.queue.published,
                has_spread=self._random.random() < 0.9,
                is_scored=True,
            )
            if outcome == "accepted":
                trees.append(self._tree(entry))

    def _learn(self, forgotten):
        step = self.queue.order.next_step
        if self._random.random() < 0.2 and self.queue.next_batch(step):
            self.queue.steps.begin(step, 0)
            self.queue.end_step(step, 0, f"result of {step}")
            self.queue.publish(step + 1, 0, step)
        if self._random.random() < 0.2 and step > self.queue.order.num_retired:
            retired = self.queue.retire(self.queue.order.num_retired)
            forgotten += [entry.lease_id for entry in retired]

    def _tree(self, entry):
        lengths = (0, 1, self._random.randint(1, self._tree_bytes))
        frames = [self._random.randbytes(length) for length in lengths]
        return NewTree(entry.lease_id, entry.attempt, self._random.getrandbits(64), frames)


def perform(store, commit):
    """Have a store do one group."""
    store.commit(commit.changes, commit.trees)
    store.forget(commit.forgotten)


def check_same(store, state, commit):
    """A store that was opened stands where the commit left it, tree by tree."""
    assert comparable(state) == comparable(commit.state)
    for lease_id, tree in commit.kept.items():
        assert store.holds(lease_id), f"the tree of lease {lease_id} is lost"
        assert store.digest_of(lease_id) == (tree.attempt, tree.digest)
        assert store.read(lease_id) == [bytes(frame) for frame in tree.frames]
