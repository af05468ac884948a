"""The processes of a small run for fault tests: the real replay, real actors' loops, the real learner's loop.

    actors (scripted engine, slow on purpose) -> replay (real sockets and store) -> learner (weights are a hash of all before)

Each process writes what it was told to a file of its own, and these files are the truth that the run is measured by
(what it must come to is `steady`'s):

    acks-<actor>.jsonl   an actor was told that a tree is accepted
    trained.jsonl        the learner made an update: step, leases, trees and weights
    pids.jsonl           a process of a role began

Waits: actors and learner as in the real run; every process ends with its parent.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tests.fakes import LIMITS, serve_replay
from tests.faults.steady import (
    HashTeam,
    RigPlan,
    append,
    content_of,
    prompt_at,
    steady_grower,
    tag_of,
)
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker as ActorWorker
from treepo_async.learner.batch import BatchRules
from treepo_async.learner.node import run_ranks
from treepo_async.learner.optimizer import OptimizerSettings
from treepo_async.learner.publishers import FolderPublisher
from treepo_async.learner.start import Start
from treepo_async.learner.worker import Worker, WorkerRules
from treepo_async.metrics.events import emit
from treepo_async.process import die_with_parent
from treepo_async.replay.server import ReplayServer
from treepo_async.weights.checkpoints import WEIGHTS_KIND, CheckpointStore, file_of
from treepo_async.weights.lineages import Lineages
from treepo_async.weights.store import WeightStore
from treepo_async.wire.codec import decode_tree, digest_of
from treepo_async.wire.messages import Ack, Hello, PutTree
from treepo_async.wire.sockets import BlockingRequester, Requester

RUN_ID = "rig"
START_S = 60.0
DIES_AFTER = 12
"""Trees that a replay has acknowledged that is to die."""


# ---------------------------------------------------------------- actors


class TellingRequester(Requester):
    """Notes every acknowledged tree, with what is in it."""

    file: Path | None = None

    async def ask(self, message, attachment=(), **more):
        """See `Requester.ask`."""
        answer = await super().ask(message, attachment, **more)
        if isinstance(message, PutTree) and self.file is not None:
            ack = answer[0]
            assert isinstance(ack, Ack)
            frames = [bytes(frame) for frame in attachment]
            row = {"lease": message.lease_id, "attempt": message.attempt, "note": ack.note}
            tree = decode_tree(frames)
            row |= {"digest": digest_of(frames), "content": content_of(tree), "tag": tag_of(tree)}
            append(self.file, row)
        return answer


async def run_actor(folder: Path, plan: RigPlan, name: str) -> None:
    """An actor for ever."""
    grower = steady_grower(plan, name, folder / "weights", tree_s=plan.tree_s)
    async with TellingRequester(
        plan.endpoint(name),
        name=name,
        owner="replay",
        resend_s=plan.resend_s,
        hello=Hello(name=name, run_id=RUN_ID),
    ) as requester:
        requester.file = folder / f"acks-{name}.jsonl"
        client = ReplayClient(requester, reply_timeout_s=START_S)
        await client.hello(Hello(name=name, run_id=RUN_ID), timeout_s=START_S)
        await ActorWorker(client, grower).serve(plan.concurrent_trees)


# ---------------------------------------------------------------- replay


class DyingServer(ReplayServer):
    """Is killed once, when it has told actors of some trees; before or after it has committed these."""

    marker: Path
    acks_first = False

    def __post_init__(self):
        super().__post_init__()
        self._commit, self._group.settle = self._group.settle, self._settle_and_die
        self._num_told = 0

    def _settle_and_die(self):
        num_trees = len(self._group.trees)
        if self.acks_first:
            self._group._send()
        else:
            self._commit()
        self._num_told += num_trees
        if num_trees and self._num_told >= DIES_AFTER and not self.marker.exists():
            # what was sent leaves the process
            time.sleep(0.05)
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._commit()


async def run_replay(folder: Path, plan: RigPlan) -> None:
    """Replay for ever."""

    def make_server(**parts):
        server = (DyingServer if plan.dies else ReplayServer)(**parts)
        server.marker, server.acks_first = folder / "died", plan.dies == "acks_first"
        return server

    async with serve_replay(
        prompt=prompt_at,
        endpoint=plan.endpoint("replay"),
        folder=folder / "replay",
        run_id=RUN_ID,
        limits=replace(LIMITS, max_lost=10**6),
        server_type=make_server,
        prompts_per_batch=plan.prompts_per_batch,
        max_staleness=plan.max_staleness,
        num_batches=plan.num_steps,
        lease_timeout_s=plan.lease_timeout_s,
        # kills are no fault of the prompt
        max_attempts=10**6,
    ):
        await asyncio.Event().wait()


# ---------------------------------------------------------------- learner


def run_learner(folder: Path, plan: RigPlan) -> None:
    """The learner's parent process, and its one rank."""
    run_ranks(partial(_make_work, folder, plan), num_ranks=1, max_restarts=10**9)


def _make_work(folder: Path, plan: RigPlan):
    checkpoints = CheckpointStore(folder / "checkpoints", keep=plan.keep)
    return partial(_lead, folder, plan, checkpoints.newest(_tell))


def _tell(error) -> None:
    emit("alarm", alarm="checkpoint passed over", detail=str(error))


def _lead(folder: Path, plan: RigPlan, checkpoint, rank: int) -> None:
    append(folder / "pids.jsonl", {"role": "rank", "pid": os.getpid()})
    lead(folder, plan, checkpoint)


def lead(folder: Path, plan: RigPlan, checkpoint) -> int:
    """The real loop of rank 0, from a checkpoint or the initial model. Gives the steps done."""
    team = HashTeam.first(step_s=plan.step_s, file=folder / "trained.jsonl")
    if checkpoint is not None:
        team.num_updates = checkpoint.state.num_updates
        team.weights = _load(checkpoint.folder / file_of(WEIGHTS_KIND))
    weights = WeightStore(folder / "weights", keep=plan.max_staleness + 3)
    store = CheckpointStore(folder / "checkpoints", keep=plan.keep)
    replay = BlockingRequester(
        plan.endpoint("learner"),
        name="learner-0",
        owner="replay",
        resend_s=plan.resend_s,
        hello=Hello(name="learner-0", run_id=RUN_ID),
    )
    lineages = Lineages(folder / "checkpoints")
    start = Start.of(
        checkpoint.state if checkpoint else None,
        published=weights.versions(),
        saved=store.versions(),
        origins=lineages.origins(),
        lineage=0,
    )
    lineages.begin(start.version.lineage, start.origin)
    worker = Worker(
        team,
        replay,
        weights,
        store,
        publisher=FolderPublisher(weights, team, torch.float32, folder / "config.json", START_S),
        start=start,
        rules=WorkerRules(
            num_steps=plan.num_steps,
            batch=BatchRules(estimator="treepo"),
            optimizer=OptimizerSettings(),
            eval_every=0,
            save_every=plan.save_every,
            max_staleness=plan.max_staleness,
            batch_timeout_s=START_S,
            reply_timeout_s=START_S,
            gap_alarm=1.0,
            layout="tp1",
        ),
    )
    try:
        return worker.run()
    finally:
        replay.close()


def _load(file: Path):
    from safetensors.torch import load_file

    tensors = load_file(file)
    return torch.cat([tensors["model.first"], tensors["model.second"]])


# ---------------------------------------------------------------- processes


def main(folder: str, role: str) -> None:
    """A process of the rig: `actor-<i>`, `replay` or `learner`."""
    die_with_parent()
    path = Path(folder)
    append(path / "pids.jsonl", {"role": role, "pid": os.getpid()})
    plan = RigPlan.parse((path / "plan.json").read_text())
    with (path / f"{role}.log").open("a") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    with contextlib.suppress(KeyboardInterrupt):
        if role == "learner":
            run_learner(path, plan)
        elif role == "replay":
            asyncio.run(run_replay(path, plan))
        else:
            asyncio.run(run_actor(path, plan, role))
