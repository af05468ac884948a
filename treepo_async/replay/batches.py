"""The learner's side of replay: batches, results, publications and checkpoints.

Survives the death of replay and of the learner: consumed batches stay available until every checkpoint covers them, and
one of which a tree is lost, in memory with an earlier replay or by damage on disk, is grown again with all later batches.
"""

from dataclasses import dataclass
from typing import Protocol

from treepo_async.errors import DataError, RefusedError
from treepo_async.metrics.events import emit
from treepo_async.replay.entry import Entry
from treepo_async.replay.queue import Queue
from treepo_async.wire.columns import ARRAYS
from treepo_async.wire.messages import AskBatch, Batch, NoBatch, Published, Refusal

FRAMES_PER_TREE = 2 + len(ARRAYS)


class Shelf(Protocol):
    """Where accepted trees lie; see `replay.store.Store`."""

    def holds(self, lease_id: str) -> bool:
        """Whether the tree is there."""

    def read(self, lease_id: str) -> list[bytes]:
        """The frames of a tree; raises DataError for one that is damaged, which is then not there any more."""


@dataclass
class Batches:
    """See the module."""

    queue: Queue
    shelf: Shelf

    def find(self, ask: AskBatch) -> tuple[Batch | NoBatch | None, list[bytes]]:
        """The batch of a step with the frames of its trees, or why there will be none; None while it is not there.

        Raises:
            RefusedError: the step is retired, or not the next; or the learner's lineage was rolled back.
        """
        self.queue.steps.meet(ask.lineage, ask.step)
        entries = self.queue.next_batch(ask.step)
        if entries is None:
            is_over = self.queue.is_over()
            return NoBatch(reason="the data has ended", final=True) if is_over else None, []
        frames = self._read(entries)
        if frames is None:
            self._grow_again(ask.step)
            return None, []
        self.queue.steps.begin(ask.step, ask.lineage)
        results = self.queue.steps.results.get(ask.step, {})
        batch = Batch(
            step=ask.step,
            lease_ids=[entry.lease_id for entry in entries],
            frames_per_tree=FRAMES_PER_TREE,
            ledger=self.queue.ledger(),
            results={n: digest for n, digest in results.items() if n != ask.lineage},
        )
        return batch, frames

    def publish(self, published: Published) -> None:
        """The trees of a batch are trained, and a policy step is out.

        Raises:
            RefusedError: the step cannot be reached with the batches that are out, or the lineage was rolled back.
        """
        following = self.queue.order.next_step
        if not 0 <= published.step <= following:
            raise RefusedError(
                Refusal.WRONG_STEP,
                f"policy step {published.step} is published, but the next batch is that of step {following}",
                retry=False,
            )
        self.queue.publish(published.step, published.lineage, published.consumed_step)

    def _read(self, entries: list[Entry]) -> list[bytes] | None:
        """The frames of all trees; None where one is lost."""
        if not all(self.shelf.holds(entry.lease_id) for entry in entries):
            return None
        frames = []
        for entry in entries:
            try:
                frames += self.shelf.read(entry.lease_id)
            except DataError as error:
                emit("alarm", alarm="tree damaged on disk", lease=entry.lease_id, detail=str(error))
                return None
        return frames

    def _grow_again(self, step: int) -> None:
        lost = self.queue.unconsume(step, self.shelf.holds)
        emit(
            "alarm", alarm="trees of a batch are lost, growing them again", step=step, num=len(lost)
        )
