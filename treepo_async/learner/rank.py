"""One rank of the learner: rank 0 runs the worker's loop, the others follow it."""

import os
import secrets
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from treepo_async.config.layout import Layout
from treepo_async.config.limits import (
    corrects_fresh,
    gap_alarm,
    needs_bounds,
    needs_proximal,
)
from treepo_async.config.schema import Config, LearnerConfig
from treepo_async.config.wiring import POLICY_FILE, Wiring
from treepo_async.errors import DataError
from treepo_async.learner.attention.plan import resolve
from treepo_async.learner.batch import BatchRules
from treepo_async.learner.broadcast import StageBroadcast
from treepo_async.learner.broadcast_desk import DeskThread
from treepo_async.learner.build import build_learner
from treepo_async.learner.checkpoint import load as load_checkpoint
from treepo_async.learner.control import Control
from treepo_async.learner.groups import close_groups, open_groups
from treepo_async.learner.loss.settings import loss_settings
from treepo_async.learner.optimizer import OptimizerSettings
from treepo_async.learner.packing.cost import CostModel
from treepo_async.learner.publishers import BroadcastPublisher, FolderPublisher, Publisher
from treepo_async.learner.start import Start
from treepo_async.learner.step import Learner
from treepo_async.learner.team import Team
from treepo_async.learner.worker import Worker, WorkerRules
from treepo_async.metrics.categories import RANK
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.metrics.tell import Teller, telling_beside
from treepo_async.weights.checkpoints import WEIGHTS_KIND, Checkpoint, CheckpointStore
from treepo_async.weights.desk import Desk
from treepo_async.weights.export import copy_companions, export, write_folder
from treepo_async.weights.lineages import Lineages
from treepo_async.weights.manifest import WEIGHTS_FILE
from treepo_async.weights.store import WeightStore
from treepo_async.wire.hello import hello_of
from treepo_async.wire.keys import client_keys, server_keys
from treepo_async.wire.sockets import BlockingRequester

RESEND_S = 4.0
"""How often rank 0 asks replay again, and with it the longest time the other ranks hear nothing."""

KEPT_TO_EVALUATE = 4
"""Publications that wait for their evaluation: without actors nothing holds the learner back until it is done."""


@dataclass(frozen=True, slots=True)
class RankJob:
    """What every rank of one start of the group is told."""

    config: Config
    wiring: Wiring
    layout: Layout
    address: str
    """Where rank 0 listens."""
    checkpoint: Checkpoint | None
    """Where to go on from; None: the initial model."""


def run_rank(job: RankJob, rank: int) -> None:
    """Open the groups, build this rank's share of the model, and work until the run has its steps."""
    settings = job.config.learner
    torch.set_num_threads(settings.cpu_threads)
    open_groups(
        job.layout,
        rank=rank,
        address=job.address,
        timeout_s=settings.group_timeout_s,
        local_rank=rank - job.wiring.first_rank,
    )
    emit("rank", rank=rank, pid=os.getpid())
    control = Control(timeout_s=settings.group_timeout_s)
    learner = learner_of(job)
    if job.checkpoint is not None:
        load_checkpoint(learner, job.checkpoint)
    broadcast = _broadcast(job) if job.wiring.weights_endpoint else None
    team = Team(learner, control, broadcast)
    if rank == 0:
        _lead(job, team)
        team.stop()
    else:
        slot = Slot(SlotLedger(RANK), f"rank-{rank}")
        with telling_beside(Teller(slot.ledger, "rank", rank=rank)):
            team.follow(slot)
    if broadcast is not None:
        broadcast.close()
    close_groups()


def _broadcast(job: RankJob) -> StageBroadcast:
    """This rank's part in sending weights to engines."""
    wiring, settings = job.wiring, job.config.weights

    return StageBroadcast.open(
        partial(_requester, wiring, wiring.weights_endpoint, "the learner's first rank"),
        address=wiring.address,
        bucket_bytes=settings.bucket_bytes,
        timeout_s=settings.timeout_s,
    )


def _requester(wiring: Wiring, endpoint: str, owner: str) -> BlockingRequester:
    return BlockingRequester(
        endpoint,
        name=wiring.role,
        owner=owner,
        hello=hello_of(wiring),
        keys=client_keys(wiring.keys_dir, wiring.role),
        resend_s=RESEND_S,
    )


def _lead(job: RankJob, team: Team) -> None:
    """Rank 0's part: the loop with replay, and what it leaves behind."""
    wiring = job.wiring
    replay = _requester(wiring, wiring.replay_endpoint, "replay")
    desk = _desk(job) if wiring.weights_endpoint else None
    try:
        replay.ask(
            hello_of(wiring),
            timeout_s=job.config.cluster.start_timeout_s,
            wait="replay to come up",
            on_resend=team.wait,
        )
        weights = WeightStore(
            wiring.weights_dir,
            keep=job.config.replay.max_staleness + 3,
            keep_marked=_kept_to_evaluate(job.config),
            unremoved=partial(_tell_unremoved, "publication"),
        )
        worker = _worker(job, team, replay, weights, desk)
        emit("ready")
        with telling_beside(Teller(worker.ledger, "learner", rank=0)):
            num_steps = worker.run()
    finally:
        replay.close()
    _check_steps(num_steps, job.config.steps)
    folder = team.keep_waiting(partial(_save_model, wiring, weights, job.config.model.dtype))
    emit("done", num_steps=num_steps, model=str(folder))
    if desk is not None:
        desk.close()


def _desk(job: RankJob) -> DeskThread:
    """Where engine hosts get the weights from."""
    wiring = job.wiring
    desk = Desk(
        name=f"{wiring.run_id}.{secrets.token_hex(4)}",
        num_stages=job.layout.pp,
        keep_marked=_kept_to_evaluate(job.config) or 1,
    )
    return DeskThread(
        desk,
        wiring.weights_endpoint,
        run_id=wiring.run_id,
        keys=server_keys(wiring.keys_dir),
    )


def _kept_to_evaluate(config: Config) -> int:
    return 0 if config.data.trees is None else KEPT_TO_EVALUATE


def _check_steps(num_steps: int, wanted: int) -> None:
    if num_steps == 0:
        raise DataError("the data ended before one batch was full; lower replay.prompts_per_batch")
    if num_steps < wanted:
        emit("alarm", alarm="the data has ended", steps=num_steps, wanted=wanted)


def learner_of(job: RankJob) -> Learner:
    """This rank's share of the learner that the config describes, with the initial model; groups are open."""
    settings = job.config.learner
    learner = build_learner(
        Path(job.wiring.model_dir),
        optimizer=optimizer_settings(settings),
        loss=loss_settings(job.config),
        microbatch_tokens=settings.microbatch_tokens,
        seed=job.config.seed,
        with_reference=settings.kl_coef > 0,
        sequence_parallel=settings.sequence_parallel,
        dtype=getattr(torch, job.config.model.dtype),
        attention=settings.attention,
        recompute=settings.recompute,
        head_tokens=settings.head_tokens,
    )
    learner.packing = settings.packing
    learner.cost = CostModel.of(
        learner.shape,
        resolve(settings.attention),
        microbatch_tokens=settings.microbatch_tokens,
    )
    return learner


def optimizer_settings(settings: LearnerConfig) -> OptimizerSettings:
    """What the config says of an update."""
    return OptimizerSettings(
        learning_rate=settings.lr,
        warmup_steps=settings.warmup_steps * settings.minibatches,
        weight_decay=settings.weight_decay,
        beta1=settings.beta1,
        beta2=settings.beta2,
        max_grad_norm=settings.clip_grad,
    )


def _worker(
    job: RankJob,
    team: Team,
    replay: BlockingRequester,
    weights: WeightStore,
    desk: DeskThread | None,
) -> Worker:
    config, settings = job.config, job.config.learner
    checkpoints = CheckpointStore(
        job.wiring.checkpoints_dir,
        keep=config.checkpoint.keep,
        unremoved=partial(_tell_unremoved, "checkpoint"),
    )
    lineages = Lineages(job.wiring.checkpoints_dir)
    start = Start.of(
        job.checkpoint.state if job.checkpoint else None,
        published=weights.versions(),
        saved=checkpoints.versions(),
        origins=lineages.origins(),
        lineage=job.wiring.lineage,
    )
    lineages.begin(start.version.lineage, start.origin)
    return Worker(
        team,
        replay,
        weights,
        checkpoints,
        publisher=_publisher(job, team, weights, desk),
        start=start,
        rules=WorkerRules(
            num_steps=config.steps,
            batch=batch_rules(config),
            optimizer=optimizer_settings(settings),
            eval_every=config.eval.every,
            save_every=config.checkpoint.every,
            max_staleness=config.replay.max_staleness,
            batch_timeout_s=settings.batch_timeout_s,
            reply_timeout_s=config.cluster.start_timeout_s,
            gap_alarm=gap_alarm(config),
            layout=str(job.layout),
        ),
    )


def _publisher(
    job: RankJob, team: Team, weights: WeightStore, desk: DeskThread | None
) -> Publisher:
    dtype, limit_s = getattr(torch, job.config.model.dtype), job.config.cluster.start_timeout_s
    if desk is not None:
        return BroadcastPublisher(weights, team, desk, dtype, limit_s)
    config_file = Path(job.wiring.model_dir) / "config.json"
    return FolderPublisher(weights, team, dtype, config_file, limit_s)


def batch_rules(config: Config) -> BatchRules:
    """How the config says a batch becomes updates."""
    settings = config.learner
    return BatchRules(
        estimator=settings.estimator,
        leave_one_out=settings.leave_one_out,
        path_weights=settings.path_weights,
        whiten=settings.whiten,
        normalizer=settings.normalizer,
        num_minibatches=settings.minibatches,
        needs_proximal=needs_proximal(config),
        needs_reference=settings.kl_coef > 0,
        needs_bounds=needs_bounds(settings),
        mean_square=settings.mask_m2po,
        vtrace_cap=settings.vtrace_cap if settings.value_correction == "vtrace" else None,
        correct_fresh=corrects_fresh(config),
    )


def _save_model(wiring: Wiring, weights: WeightStore, dtype: str) -> Path:
    """The last publication with the tokenizer beside it: a Hugging Face folder, complete by one rename.

    Where publications have no tensors, they come from the last checkpoint, which is of the same version.
    """
    folder, version = Path(wiring.run_dir) / "model", weights.versions()[-1]
    shutil.rmtree(folder, ignore_errors=True)
    if not (weights.path(version) / WEIGHTS_FILE).exists():
        checkpoint = CheckpointStore(wiring.checkpoints_dir, keep=1).at(
            version, kinds=[WEIGHTS_KIND]
        )
        export(checkpoint, Path(wiring.model_dir), folder, dtype=dtype)
        return folder

    def fill(building: Path) -> None:
        copy_companions(Path(wiring.model_dir), building, dtype=dtype)
        shutil.copyfile(weights.path(version) / WEIGHTS_FILE, building / WEIGHTS_FILE)
        (building / POLICY_FILE).write_text(f"{version}\n")

    write_folder(folder, fill)
    return folder


def _tell_unremoved(kind: str, error: OSError) -> None:
    emit("alarm", alarm=f"an old {kind} is not removed", detail=str(error))
