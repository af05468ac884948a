"""The loop of the learner's rank 0: batch -> updates -> publication -> checkpoint.

Waits: for a batch (actors and replay end the wait; replay says every few seconds what is missing; the deadline is
`batch_timeout_s`), for replay's answers (`reply_timeout_s`; a replay that is started again is asked again). While it
waits it tells the other ranks so. Every step makes a new policy version, also when its update was skipped, so that
versions and steps stay in line.

A learner that goes back to a checkpoint works under a new lineage. Replay gives it the batches since then once more,
in the same order; what had been published of them is not published again.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from treepo_async.errors import DeadlineError, TreepoError, WireError
from treepo_async.learner import checkpoint
from treepo_async.learner.batch import BatchRules, BatchTrainer
from treepo_async.learner.batch import Team as BatchTeam
from treepo_async.learner.loss.result import StepResult
from treepo_async.learner.publish import probe_sequences, publish
from treepo_async.learner.step import WEIGHTS
from treepo_async.learner.summary import summarize
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import TimeLedger
from treepo_async.types import Float32, Int32, PolicyVersion, Tree
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState
from treepo_async.weights.store import WeightStore
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import (
    AnyMessage,
    AskBatch,
    Batch,
    Message,
    NoBatch,
    Published,
    Retired,
)
from treepo_async.wire.sockets import BlockingRequester

BATCH_WAIT_S = 5.0
MAX_SKIPPED = 3
"""Steps in a row whose updates were all skipped before the run ends."""


class Team(BatchTeam, Protocol):
    """What the loop asks of all ranks; see `team.Team`."""

    @property
    def num_updates(self) -> int:
        """Updates the optimizer has made."""

    def wait(self) -> None:
        """Say that there is nothing to do yet."""

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """Log-probs of each token but the first."""

    def export(self, kind: str = WEIGHTS) -> Iterator[tuple[str, Any]]:
        """Full HF tensors by name."""


@dataclass(frozen=True, slots=True)
class WorkerRules:
    """How the loop runs."""

    num_steps: int
    batch: BatchRules
    eval_every: int
    save_every: int
    """Steps between checkpoints."""
    batch_timeout_s: float
    reply_timeout_s: float
    """Longest wait for an answer of replay; one that was killed must be able to start within it."""
    gap_alarm: float
    """Largest log-prob difference to the engine that passes without an alarm, in nats."""
    dtype: torch.dtype
    layout: str


@dataclass(frozen=True, slots=True)
class Start:
    """Where the loop begins."""

    version: PolicyVersion
    """Of the weights it begins with."""
    newest_published: int
    """Policy step of the newest publication there is, -1 without any."""
    probe_sequences: Sequence[Int32] = ()
    """[T] each, where the weights come from a checkpoint."""

    @classmethod
    def of(
        cls,
        state: TrainingState | None,
        *,
        published: Sequence[PolicyVersion],
        saved: Sequence[PolicyVersion],
        lineage: int,
    ) -> Self:
        """After a checkpoint, or without one.

        Args:
            state: of the checkpoint that was loaded; None for the initial model.
            published: all versions that engines may have.
            saved: versions of all checkpoints, damaged ones too.
            lineage: least one that may be used.
        """
        used = max((version.lineage for version in [*published, *saved]), default=-1)
        step = 0 if state is None else state.policy_version.step
        probe = [] if state is None else [np.array(ids, np.int32) for ids in state.probe_token_ids]
        return cls(
            PolicyVersion(max(lineage, used + 1), step),
            newest_published=max((version.step for version in published), default=-1),
            probe_sequences=probe,
        )


class Worker:
    """Trains until `num_steps` steps are done, or until the data ends."""

    def __init__(
        self,
        team: Team,
        replay: BlockingRequester,
        weights: WeightStore,
        checkpoints: CheckpointStore,
        *,
        config_file: Path,
        start: Start,
        rules: WorkerRules,
    ) -> None:
        self._team, self._replay = team, replay
        self._trainer = BatchTrainer(team, rules.batch)
        self._weights, self._checkpoints = weights, checkpoints
        self._config_file, self._rules = config_file, rules
        self._version, self._start = start.version, start
        self._saved_step = start.version.step
        self._ledger = TimeLedger()
        self._num_skipped = 0

    def run(self) -> int:
        """Train. Gives the number of steps done, those before the start included.

        Raises:
            DeadlineError: a batch did not come in time.
            TreepoError: in `MAX_SKIPPED` steps in a row no update was finite.
        """
        if self._version.step > 0 and self._start.newest_published < 0:
            # engines have the initial model only
            self._publish(self._start.probe_sequences, evaluate=False)
        sequences = self._start.probe_sequences
        while self._version.step < self._rules.num_steps:
            with self._ledger("wait_batch"):
                batch = self._next_batch(self._version.step)
            if batch is None:
                break
            sequences = probe_sequences(batch[0])
            self._step(*batch)
            if self._version.step % self._rules.save_every == 0:
                self._save(sequences)
        self._save(sequences)
        if self._version.step > 0 and self._version not in self._weights.versions():
            # the data ended before what had been published in an earlier lineage was reached again
            self._publish(sequences, evaluate=False)
        return self._version.step

    def _step(self, trees: list[Tree], replay_ledger: dict[str, int]) -> None:
        trained_from, step = self._version, self._version.step
        with self._ledger("train"):
            result = self._trainer.train(trees, version=trained_from)
        self._check(result, step)
        self._version = PolicyVersion(trained_from.lineage, step + 1)
        with self._ledger("publish"):
            if self._version.step >= self._start.newest_published:
                self._publish(
                    probe_sequences(trees), evaluate=self._is_evaluated(self._version.step)
                )
            self._ask(Published(step=self._version.step, consumed_step=step))
        emit(
            "step",
            step=step,
            policy_step=self._version.step,
            lineage=self._version.lineage,
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
            answer, frames = self._ask(AskBatch(step=step, wait_s=BATCH_WAIT_S))
            if isinstance(answer, Batch):
                return _split(frames, answer.frames_per_tree), answer.ledger
            if not isinstance(answer, NoBatch):
                raise WireError(f"AskBatch was answered by {type(answer).__name__}")
            if answer.final:
                return None
            missing = answer.reason
            self._team.wait()
            emit("waiting", role="learner", wait=f"batch of step {step}", missing=missing)
        wait = f"the batch of step {step} ({missing})"
        raise DeadlineError(wait, "the actors", self._rules.batch_timeout_s)

    def _publish(self, sequences: Sequence[Int32], *, evaluate: bool) -> None:
        publish(
            self._weights,
            self._team,
            self._version,
            sequences,
            dtype=self._rules.dtype,
            config_file=self._config_file,
            evaluate=evaluate,
            apart=self._team.keep_waiting,
        )

    def _save(self, sequences: Sequence[Int32]) -> None:
        """Make a checkpoint, unless there is one of this step; replay may then forget what it covers."""
        if self._version.step == self._saved_step:
            return
        with self._ledger("save"):
            checkpoint.save(
                self._checkpoints,
                self._team,
                self._version,
                layout=self._rules.layout,
                probe_sequences=sequences,
                apart=self._team.keep_waiting,
            )
            self._saved_step = self._version.step
            self._ask(Retired(step=self._version.step - 1))
        emit("saved", version=str(self._version))

    def _is_evaluated(self, step: int) -> bool:
        every = self._rules.eval_every
        return every > 0 and (step % every == 0 or step == self._rules.num_steps)

    def _ask(self, message: Message) -> tuple[AnyMessage, list[bytes]]:
        return self._replay.ask(
            message,
            timeout_s=self._rules.reply_timeout_s,
            wait=f"an answer to {type(message).__name__}",
            on_resend=self._team.wait,
        )

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
        if result.num_skipped:
            emit(
                "alarm",
                alarm="update skipped: loss or gradient not finite",
                step=step,
                skipped=result.num_skipped,
                updates=result.num_updates,
            )
        is_idle = result.num_skipped == result.num_updates
        self._num_skipped = self._num_skipped + 1 if is_idle else 0
        if self._num_skipped >= MAX_SKIPPED:
            raise TreepoError(
                f"{MAX_SKIPPED} steps in a row had no update whose loss and gradient are finite; lower learner.lr"
            )


def _split(frames: Sequence[bytes], frames_per_tree: int) -> list[Tree]:
    starts = range(0, len(frames), frames_per_tree)
    return [decode_tree(frames[i : i + frames_per_tree]) for i in starts]
