"""The loop of the learner's rank 0: batch -> updates -> result -> publication -> checkpoint.

    AskBatch(s)    replay notes that the batch of step s is taken, and by which lineage, then gives it out
    updates
    Trained(s)     replay notes the digest of the result, before anybody can see the weights
    publication
    Published      engines may sample under policy step s + 1
    checkpoint
    Retired        replay forgets the trees of steps that every kept checkpoint covers

Waits: for a batch (see `supply`), for replay's answers (`reply_timeout_s`; a replay that is started again is asked again, and
one whose disk is full for as long as it says so: a person makes room).
While it waits it tells the other ranks so. Every step makes a new policy version, also when its update was skipped, so that
versions and steps stay in line.

A learner may be killed between any two of these. It goes back to its newest checkpoint under a new lineage, is given the
batches since then once more, in the same order, and makes the same weights of them; what had been published of them is not
published again. A checkpoint that cannot be written is told of and tried again `save_every` steps later: what is lost
meanwhile is time, not steps. Only where the last one of the run fails, the run does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from treepo_async import chaos
from treepo_async.errors import DeadlineError, TreepoError, WeightsError
from treepo_async.learner import checkpoint
from treepo_async.learner.batch import BatchRules, BatchTrainer
from treepo_async.learner.batch import Team as BatchTeam
from treepo_async.learner.digest import digest_of
from treepo_async.learner.loss.result import StepResult, merge
from treepo_async.learner.optimizer import OptimizerSettings
from treepo_async.learner.publish import probe_sequences
from treepo_async.learner.publishers import Publisher
from treepo_async.learner.start import Start
from treepo_async.learner.step import WEIGHTS
from treepo_async.learner.summary import summarize
from treepo_async.learner.supply import StepBatch, Supply
from treepo_async.metrics.categories import LEARNER
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import Since, SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.types import Float32, Int32, PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.store import WeightStore
from treepo_async.wire.messages import AnyMessage, Message, Published, Refusal, Retired, Trained
from treepo_async.wire.sockets import BlockingRequester

MAX_SKIPPED = 3
"""Steps in a row whose updates were all skipped before the run ends."""
MAX_NAMED = 64
"""Leases of a batch that its span in the trace names."""


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
    optimizer: OptimizerSettings
    eval_every: int
    save_every: int
    """Steps between checkpoints."""
    max_staleness: int
    """Steps between sampling and training of any segment."""
    batch_timeout_s: float
    reply_timeout_s: float
    """Longest wait for an answer of replay; one that was killed must be able to start within it."""
    gap_alarm: float
    """Largest log-prob difference to the engine that passes without an alarm, in nats."""
    layout: str


class Worker:
    """Trains until `num_steps` steps are done, or until the data ends."""

    def __init__(
        self,
        team: Team,
        replay: BlockingRequester,
        weights: WeightStore,
        checkpoints: CheckpointStore,
        *,
        publisher: Publisher,
        start: Start,
        rules: WorkerRules,
    ) -> None:
        self._team, self._replay = team, replay
        self._trainer = BatchTrainer(team, rules.batch)
        self._weights, self._checkpoints = weights, checkpoints
        self._rules = rules
        self._publisher = publisher
        self._version, self._start = start.version, start
        self._ancestry = start.ancestry
        self._supply = Supply(
            self._ask,
            team.wait,
            start.ancestry,
            max_staleness=rules.max_staleness,
            batch_timeout_s=rules.batch_timeout_s,
        )
        self._saved_step = start.version.step
        self.ledger = SlotLedger(LEARNER)
        """Where its time goes."""
        self._slot, self._step_time = Slot(self.ledger, "rank-0"), Since(self.ledger)
        self._num_skipped = 0

    def run(self) -> int:
        """Train. Gives the number of steps done, those before the start included.

        Raises:
            DeadlineError: a batch did not come in time.
            RefusedError: another learner has taken this one's place.
            WeightsError: the last checkpoint cannot be written.
            TreepoError: in `MAX_SKIPPED` steps in a row no update was finite.
        """
        self._begin()
        sequences = self._start.probe_sequences
        while self._version.step < self._rules.num_steps:
            with self._slot("wait_batch", step=self._version.step):
                batch = self._supply.next(self._version.step)
            if batch is None:
                break
            sequences = probe_sequences(batch.trees)
            self._step(batch)
            if self._version.step % self._rules.save_every == 0:
                self._try_to_save(sequences)
        self._save(sequences)
        if self._version.step > 0 and self._version not in self._weights.versions():
            # the data ended before what had been published in an earlier lineage was reached again
            self._publish(sequences, evaluate=False)
        return self._version.step

    def _begin(self) -> None:
        """Have engines and replay know the weights that were loaded."""
        step = self._version.step
        if step == 0:
            return
        if self._start.newest_published < 0:
            # engines have the initial model only
            self._publish(self._start.probe_sequences, evaluate=False)
        else:
            self._publisher.begin(self._version, self._start.probe_sequences)
        self._tell_published(step, consumed_step=step - 1)

    def _step(self, batch: StepBatch) -> None:
        trained_from, step = self._version, self._version.step
        with self._slot("train", step=step, leases=batch.lease_ids[:MAX_NAMED]):
            updates = self._trainer.updates(batch.trees, version=trained_from)
            chaos.point("learner.after_optimizer")
            digest = self._note(step, batch, updates)
        result = merge(updates)
        self._check(result, step, batch.lease_ids)
        self._version = PolicyVersion(trained_from.lineage, step + 1)
        with self._slot("publish", version=str(self._version)):
            if self._version.step >= self._start.newest_published:
                self._publish(
                    probe_sequences(batch.trees), evaluate=self._is_evaluated(self._version.step)
                )
                chaos.point("learner.after_publish")
            self._tell_published(self._version.step, consumed_step=step)
        emit(
            "step",
            step=step,
            policy_step=self._version.step,
            lineage=self._version.lineage,
            digest=digest,
            max_staleness=self._rules.max_staleness,
            **asdict(result),
            **summarize(batch.trees, trained_from),
            seconds=self._seconds(),
            replay=batch.ledger,
        )

    def _note(self, step: int, batch: StepBatch, updates: Sequence[StepResult]) -> str:
        """Have replay note the result of a step, and compare it with what earlier lineages had. Gives its digest."""
        digest = digest_of(step, batch.lease_ids, updates, self._rules.optimizer)
        self._tell(Trained(step=step, lineage=self._version.lineage, digest=digest))
        chaos.point("learner.after_journal")
        for lineage in self._ancestry.repeated(step, digest, batch.results):
            emit(
                "alarm",
                alarm=f"step {step} done again has another result than in lineage {lineage}: a key, the layout or the "
                "machine was changed; what was sampled since counts as sampled by other weights",
                step=step,
                lineage=lineage,
            )
        return digest

    def _tell_published(self, step: int, *, consumed_step: int) -> None:
        lineage = self._version.lineage
        self._tell(Published(step=step, lineage=lineage, consumed_step=consumed_step))

    def _publish(self, sequences: Sequence[Int32], *, evaluate: bool) -> None:
        self._publisher.publish(self._version, sequences, evaluate=evaluate)

    def _try_to_save(self, sequences: Sequence[Int32]) -> None:
        """`_save`, where a later checkpoint can make up for this one."""
        try:
            self._save(sequences)
        except WeightsError as error:
            emit(
                "alarm",
                alarm="a checkpoint is left out, the run goes on",
                step=self._version.step,
                detail=str(error),
            )

    def _save(self, sequences: Sequence[Int32]) -> None:
        """Make a checkpoint, unless there is one of this step; replay may then forget what all that are kept cover."""
        if self._version.step == self._saved_step:
            return
        with self._slot("save", version=str(self._version)):
            checkpoint.save(
                self._checkpoints,
                self._team,
                self._version,
                layout=self._rules.layout,
                probe_sequences=sequences,
                ancestry=self._ancestry.equal,
                apart=self._team.keep_waiting,
            )
            self._saved_step = self._version.step
            self._retire()
        emit("saved", version=str(self._version))

    def _retire(self) -> None:
        covered = self._team.keep_waiting(self._checkpoints.covered_step)
        if covered:
            self._tell(Retired(step=covered - 1))
            self._supply.retire(covered - 1)

    def _is_evaluated(self, step: int) -> bool:
        every = self._rules.eval_every
        return every > 0 and (step % every == 0 or step == self._rules.num_steps)

    def _seconds(self) -> dict[str, float]:
        """By activity since the last step, and the `wall` that they sum to."""
        taken = self._step_time.take()
        return {**taken.seconds, "wall": taken.wall}

    def _tell(self, message: Message) -> None:
        """Have replay note something before anything else goes on."""
        with self._slot("ack", message=type(message).__name__):
            self._ask(message)

    def _ask(self, message: Message) -> tuple[AnyMessage, list[bytes]]:
        is_told = False
        while True:
            try:
                return self._replay.ask(
                    message,
                    timeout_s=self._rules.reply_timeout_s,
                    wait=f"an answer to {type(message).__name__}",
                    on_resend=self._team.wait,
                )
            except DeadlineError as error:
                if error.refusal != Refusal.DISK_FULL:
                    raise
                if not is_told:
                    emit(
                        "alarm",
                        alarm="the learner waits for room on replay's disk",
                        detail=str(error),
                    )
                is_told = True

    def _check(self, result: StepResult, step: int, lease_ids: Sequence[str]) -> None:
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
                leases=list(lease_ids),
            )
        is_idle = result.num_skipped == result.num_updates
        self._num_skipped = self._num_skipped + 1 if is_idle else 0
        if self._num_skipped >= MAX_SKIPPED:
            raise TreepoError(
                f"{MAX_SKIPPED} steps in a row had no update whose loss and gradient are finite; lower learner.lr"
            )
