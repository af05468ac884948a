"""The learner's loop: batch -> advantages -> update -> publication.

Waits: for a batch (actors and replay end the wait; replay says every few seconds what is missing; the deadline is
`batch_timeout_s`). Every step publishes a new policy version, also when its update was skipped, so that versions
and steps stay in line.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from treepo_async.errors import DeadlineError, TreepoError, WireError
from treepo_async.learner.publish import publish
from treepo_async.learner.step import Learner, StepResult
from treepo_async.learner.summary import summarize
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import TimeLedger
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion, Tree
from treepo_async.weights.store import WeightStore
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import AskBatch, Batch, NoBatch, Published, Retired
from treepo_async.wire.sockets import BlockingRequester

BATCH_WAIT_S = 5.0
REPLY_TIMEOUT_S = 60.0
MAX_SKIPPED = 3
"""Updates skipped in a row before the run ends."""


@dataclass(frozen=True, slots=True)
class WorkerRules:
    """How the loop runs."""

    num_steps: int
    estimator: str
    whiten: bool
    eval_every: int
    batch_timeout_s: float
    gap_alarm: float
    """Largest log-prob difference to the engine that passes without an alarm, in nats."""
    dtype: torch.dtype


class Worker:
    """Trains `num_steps` steps, or until the data ends."""

    def __init__(
        self,
        learner: Learner,
        replay: BlockingRequester,
        store: WeightStore,
        *,
        config_file: Path,
        rules: WorkerRules,
    ) -> None:
        self._learner, self._replay, self._store = learner, replay, store
        self._config_file, self._rules = config_file, rules
        self._version = PolicyVersion(0, 0)
        self._ledger = TimeLedger()
        self._num_skipped = 0

    def run(self) -> int:
        """Train. Gives the number of steps done.

        Raises:
            DeadlineError: a batch did not come in time.
            TreepoError: `MAX_SKIPPED` updates in a row were not finite.
        """
        for step in range(self._rules.num_steps):
            with self._ledger("wait_batch"):
                batch = self._next_batch(step)
            if batch is None:
                return step
            self._step(step, *batch)
        return self._rules.num_steps

    def _step(self, step: int, trees: list[Tree], replay_ledger: dict[str, int]) -> None:
        trained_from = self._version
        with self._ledger("train"):
            advantages = batch_advantages(trees, self._rules.estimator, whitened=self._rules.whiten)
            result = self._learner.train(trees, advantages, version=trained_from)
        self._check(result, step)
        with self._ledger("publish"):
            self._publish(step, trees)
        emit(
            "step",
            step=step,
            policy_step=self._version.step,
            **asdict(result),
            **summarize(trees, trained_from),
            seconds=self._ledger.close(),
            replay=replay_ledger,
        )

    def _next_batch(self, step: int) -> tuple[list[Tree], dict[str, int]] | None:
        """The trees of a step, and how all leases stand; None when the data has ended."""
        deadline = time.monotonic() + self._rules.batch_timeout_s
        missing = "replay"
        while time.monotonic() < deadline:
            answer, frames = self._replay.ask(
                AskBatch(step=step, wait_s=BATCH_WAIT_S),
                timeout_s=REPLY_TIMEOUT_S,
                wait="an answer to AskBatch",
            )
            if isinstance(answer, Batch):
                return _split(frames, answer.frames_per_tree), answer.ledger
            if not isinstance(answer, NoBatch):
                raise WireError(f"AskBatch was answered by {type(answer).__name__}")
            if answer.final:
                return None
            missing = answer.reason
            emit("waiting", role="learner", wait=f"batch of step {step}", missing=missing)
        wait = f"the batch of step {step} ({missing})"
        raise DeadlineError(wait, "the actors", self._rules.batch_timeout_s)

    def _publish(self, step: int, trees: Sequence[Tree]) -> None:
        self._version = PolicyVersion(self._version.lineage, self._version.step + 1)
        every, done = self._rules.eval_every, step + 1
        publish(
            self._store,
            self._learner,
            self._version,
            trees,
            dtype=self._rules.dtype,
            config_file=self._config_file,
            evaluate=every > 0 and (done % every == 0 or done == self._rules.num_steps),
        )
        message = Published(step=self._version.step, consumed_step=step)
        self._replay.ask(message, timeout_s=REPLY_TIMEOUT_S, wait="an answer to Published")
        # the publication is on disk, so nothing would train these trees again
        self._replay.ask(Retired(step=step), timeout_s=REPLY_TIMEOUT_S, wait="an answer to Retired")

    def _check(self, result: StepResult, step: int) -> None:
        """Alarm a step whose numbers should not be, and end the run when updates keep failing."""
        # a step without tokens of the current version has a gap of NaN, which is above nothing
        if result.logprob_gap_max > self._rules.gap_alarm:
            emit(
                "alarm",
                alarm="engine and learner log-probs differ on sampled tokens",
                step=step,
                gap=result.logprob_gap_max,
            )
        if result.skipped:
            emit("alarm", alarm="update skipped: loss or gradient not finite", step=step)
        self._num_skipped = self._num_skipped + 1 if result.skipped else 0
        if self._num_skipped >= MAX_SKIPPED:
            raise TreepoError(
                f"{MAX_SKIPPED} updates in a row had a loss or gradient that is not finite; lower learner.lr"
            )


def _split(frames: Sequence[bytes], frames_per_tree: int) -> list[Tree]:
    starts = range(0, len(frames), frames_per_tree)
    return [decode_tree(frames[i : i + frames_per_tree]) for i in starts]
