"""What happens to a tree that an actor delivers: checked as bytes, decided on by the queue, kept with the group.

    size -> digest -> known already? -> facts (every invariant of a tree) -> claims -> queue

A tree that breaks a rule costs its actor a strike and its lease an attempt; its first bytes are put aside for a person.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from treepo_async.errors import RefusedError, WireError
from treepo_async.metrics.events import emit
from treepo_async.replay.group import Group
from treepo_async.replay.queue import Queue
from treepo_async.replay.report import report_facts
from treepo_async.replay.store import NewTree
from treepo_async.wire.codec import digest_of
from treepo_async.wire.facts import TreeFacts, facts_of
from treepo_async.wire.messages import PutTree, Refusal

DUPLICATE = "duplicate"


class Known(Protocol):
    """What is stored; see `replay.store.Store`."""

    def digest_of(self, lease_id: str) -> tuple[int, int] | None:
        """Attempt and digest of a stored tree."""


@dataclass
class Deliveries:
    """See the module."""

    queue: Queue
    known: Known
    group: Group
    vocab_size: int
    max_bytes: int
    """Of a tree."""

    def take(self, message: PutTree, frames: Sequence[bytes]) -> str:
        """Decide on a tree. Gives what became of it: `accepted`, `duplicate`, or why it was dropped.

        Raises:
            WireError: the tree or what is said of it is invalid.
            RefusedError: it is too large, too old, of an unknown lease or of weights that were never published.
        """
        size = sum(map(len, frames))
        if size > self.max_bytes:
            raise RefusedError(
                Refusal.OVERSIZE,
                f"the tree has {size} bytes, replay.max_tree_bytes is {self.max_bytes}",
                retry=False,
            )
        if digest_of(frames) != message.digest:
            raise WireError("the tree's bytes are not those that were sent: its digest differs")
        if self._is_known(message):
            return DUPLICATE
        facts = facts_of(frames, vocab_size=self.vocab_size)
        self._check_claims(message, facts)
        outcome = self._decide(message, facts)
        if outcome == "accepted":
            self.group.add(NewTree(message.lease_id, message.attempt, message.digest, frames))
        if outcome != DUPLICATE:
            report_facts(facts, outcome)
        return outcome

    def _decide(self, message: PutTree, facts: TreeFacts) -> str:
        try:
            return self.queue.accept(
                message.lease_id,
                message.attempt,
                oldest_step=facts.oldest.step,
                has_spread=facts.has_spread,
                is_scored=facts.is_scored,
            )
        except RefusedError as error:
            # what it cost is told all the same
            report_facts(facts, error.reason)
            raise

    def _is_known(self, message: PutTree) -> bool:
        """Whether this very tree is here.

        Raises:
            WireError: another one is, for the same attempt.
        """
        waiting = self.group.trees.get(message.lease_id)
        if waiting is not None:
            known: tuple[int, int] | None = (waiting.attempt, waiting.digest)
        else:
            known = self.known.digest_of(message.lease_id)
        if known is None or known[0] != message.attempt or self.queue.is_open(message.lease_id):
            return False
        if known[1] == message.digest:
            return True
        emit("alarm", alarm="two different trees of one lease and attempt", lease=message.lease_id)
        raise WireError(f"lease {message.lease_id} has another tree of attempt {message.attempt}")

    def _check_claims(self, message: PutTree, facts: TreeFacts) -> None:
        """What a tree says of itself must fit its lease and what has been published."""
        if facts.provenance.lease_id != message.lease_id:
            raise WireError(
                f"provenance.lease_id is {facts.provenance.lease_id}, delivered for {message.lease_id}"
            )
        entry = self.queue.order.live.get(message.lease_id)
        if entry is not None and not 1 <= message.attempt <= entry.attempt:
            raise WireError(
                f"attempt is {message.attempt}, lease {message.lease_id} had attempts 1 to {entry.attempt}"
            )
        for version in facts.versions:
            # the learner publishes a moment before it says so, maybe as the first act of a lineage, or as the last one,
            # or both
            newest = self.queue.steps.lineages.get(version.lineage, self.queue.published)
            is_latest = version.lineage >= max(self.queue.steps.lineages)
            known = (max(newest, self.queue.published) if is_latest else newest) + 1
            if version.step > known or version.lineage > max(self.queue.steps.lineages) + 1:
                raise RefusedError(
                    Refusal.FUTURE_VERSION,
                    f"sampled under {version}, but {version.lineage}.{known} is the newest there is",
                    retry=False,
                )
