"""The trees of one step after another, from replay to what the learner trains on.

Waits: for a batch (actors and replay end the wait; replay says every few seconds what is missing; the deadline is
`batch_timeout_s`). While it waits it tells the other ranks so.

Invariants, checked for every batch though replay keeps them too: no segment that is trained was sampled more than
`max_staleness` steps before, and no lease is in two steps.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from treepo_async.errors import DataError, DeadlineError, WireError
from treepo_async.learner.ancestry import Ancestry
from treepo_async.metrics.events import emit
from treepo_async.types import NO_LINEAGE, Tree
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import AnyMessage, AskBatch, Batch, Message, NoBatch

BATCH_WAIT_S = 5.0

Ask = Callable[[Message], tuple[AnyMessage, list[bytes]]]
"""Asks replay and waits for its answer."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The trees of a step."""

    trees: list[Tree]
    """In lease order, under the names that versions have in the lineage that trains."""
    lease_ids: list[str]
    ledger: Mapping[str, int]
    """How every lease so far stands."""
    results: Mapping[int, str]
    """What earlier lineages had of this step: see `messages.Batch`."""


@dataclass
class Supply:
    """Asks for batches and checks them."""

    ask: Ask
    wait: Callable[[], None]
    """Called whenever there is nothing yet."""
    ancestry: Ancestry
    max_staleness: int
    batch_timeout_s: float
    _step_of: dict[str, int] = field(default_factory=dict)
    """Of each lease that was given out and is not retired."""

    def next(self, step: int) -> StepBatch | None:
        """The batch of a step; None when the data has ended.

        Raises:
            DeadlineError: it did not come in time.
            DataError: a tree is too old for the step, or was trained in another one.
            WireError: a tree cannot be read.
        """
        deadline = time.monotonic() + self.batch_timeout_s
        missing = "replay"
        while time.monotonic() < deadline:
            wanted = AskBatch(step=step, lineage=self.ancestry.lineage, wait_s=BATCH_WAIT_S)
            answer, frames = self.ask(wanted)
            if isinstance(answer, Batch):
                return self._take(answer, frames)
            if not isinstance(answer, NoBatch):
                raise WireError(f"AskBatch was answered by {type(answer).__name__}")
            if answer.final:
                return None
            missing = answer.reason
            self.wait()
            emit("waiting", role="learner", wait=f"batch of step {step}", missing=missing)
        wait = f"the batch of step {step} ({missing})"
        raise DeadlineError(wait, "the actors", self.batch_timeout_s)

    def retire(self, step: int) -> None:
        """Batches up to and including `step` will not be asked for again."""
        self._step_of = {lease: kept for lease, kept in self._step_of.items() if kept > step}

    def _take(self, batch: Batch, frames: Sequence[bytes]) -> StepBatch:
        trees = _split(frames, batch.frames_per_tree)
        if len(trees) != len(batch.lease_ids):
            raise WireError(f"a batch of {len(batch.lease_ids)} leases has {len(trees)} trees")
        for lease_id, tree in zip(batch.lease_ids, trees, strict=True):
            self._check_once(lease_id, batch.step)
            # one that was taken before kept the bound which held then
            if not batch.results:
                self._check_age(lease_id, tree, batch.step)
        renamed = self.ancestry.rename(trees)
        return StepBatch(renamed, batch.lease_ids, batch.ledger, batch.results)

    def _check_once(self, lease_id: str, step: int) -> None:
        before = self._step_of.setdefault(lease_id, step)
        if before != step:
            raise DataError(f"lease {lease_id} is in step {step}, and was trained in step {before}")

    def _check_age(self, lease_id: str, tree: Tree, step: int) -> None:
        versions = {segment.policy_version for segment in tree.whole_segments}
        sampled = [version for version in versions if version.lineage != NO_LINEAGE]
        oldest = min(sampled, key=lambda version: version.step, default=None)
        if oldest is not None and step - oldest.step > self.max_staleness:
            raise DataError(
                f"lease {lease_id} has a segment of policy version {oldest}, which is {step - oldest.step} steps older "
                f"than step {step} that trains on it; replay.max_staleness={self.max_staleness} allows no such batch"
            )


def _split(frames: Sequence[bytes], frames_per_tree: int) -> list[Tree]:
    starts = range(0, len(frames), frames_per_tree)
    return [decode_tree(frames[i : i + frames_per_tree]) for i in starts]
