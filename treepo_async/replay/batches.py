"""The learner's side of replay: batches, publications and checkpoints, each on disk before it is answered.

Survives the death of replay and of the learner: consumed batches stay available until a checkpoint covers them, and
one whose trees died with an earlier replay is grown again, with those of all later batches.
"""

from dataclasses import dataclass

from treepo_async.errors import RefusedError
from treepo_async.metrics.events import emit
from treepo_async.replay.position_files import PositionFiles
from treepo_async.replay.queue import Queue
from treepo_async.replay.spool import Spool
from treepo_async.wire.codec import ARRAYS
from treepo_async.wire.messages import Batch, NoBatch, Published

FRAMES_PER_TREE = 2 + len(ARRAYS)


@dataclass
class Batches:
    """See the module."""

    queue: Queue
    spool: Spool
    positions: PositionFiles

    def find(self, step: int) -> tuple[Batch | NoBatch | None, list[bytes]]:
        """The batch of a step with the frames of its trees, or why there will be none; None while it is not there.

        Raises:
            RefusedError: the step is retired, or not the next.
        """
        following = self.queue.order.next_step
        entries = self.queue.next_batch(step)
        if entries is None:
            is_over = self.queue.is_over()
            return NoBatch(reason="the data has ended", final=True) if is_over else None, []
        if self.queue.order.next_step > following:
            self.positions.write(self.queue.position())
        lease_ids = [entry.lease_id for entry in entries]
        if not all(self.spool.holds(lease_id) for lease_id in lease_ids):
            self._grow_again(step)
            return None, []
        batch = Batch(
            step=step,
            lease_ids=lease_ids,
            frames_per_tree=FRAMES_PER_TREE,
            ledger=self.queue.ledger(),
        )
        return batch, [frame for lease_id in lease_ids for frame in self.spool.read(lease_id)]

    def publish(self, published: Published) -> None:
        """The trees of a batch are trained, and a policy step is out.

        Raises:
            RefusedError: the step cannot be reached with the batches that are out.
        """
        following = self.queue.order.next_step
        if not 0 <= published.step <= following:
            raise RefusedError(
                "wrong_step",
                f"policy step {published.step} is published, but the next batch is that of step {following}",
                retry=False,
            )
        self.queue.publish(published.step, published.consumed_step)
        self.positions.write_published(published.step, self.queue.position())

    def retire(self, step: int) -> None:
        """A durable checkpoint covers all batches up to and including `step`."""
        retired = self.queue.retire(step)
        self.positions.write_retired(self.queue.position())
        self.spool.forget(entry.lease_id for entry in retired)

    def _grow_again(self, step: int) -> None:
        lost = self.queue.unconsume(step, self.spool.holds)
        self.positions.write(self.queue.position())
        emit(
            "alarm",
            alarm="batch lost with replay, growing it again",
            step=step,
            num_trees=len(lost),
        )
