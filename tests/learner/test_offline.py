"""Training on a file of trees against training on the same trees as they are grown, with the real Megatron model."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.actor.test_generation import StillEngine
from tests.fakes import (
    VOCAB_SIZE,
    ScriptedEngine,
    ascii_settings,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
)
from tests.learner.test_worker import FRESH, RULES
from treepo_async.actor.generation import Generation
from treepo_async.actor.grow import Grower
from treepo_async.actor.job import Job
from treepo_async.actor.output import Output
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.tally import Tally
from treepo_async.actor.worker import Worker as ActorWorker
from treepo_async.learner.publishers import FolderPublisher
from treepo_async.learner.worker import Worker
from treepo_async.replay.feed import TreeFeed
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.store import WeightStore
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import BlockingRequester, Requester
from treepo_async.wire.tree_file import TreeFile

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups"), pytest.mark.timeout(120)]

NUM_STEPS, BATCH, NUM_PROMPTS, SEED = 3, 4, 40, 5
QUEUE = {
    "prompts_per_batch": BATCH,
    "num_batches": NUM_STEPS,
    "max_staleness": 0,
    "drop_degenerate": True,
    "max_refills": 64,
}


def grower():
    """Its engine's tokens and log-probs do not depend on any weights."""
    scoring = scoring_by(lambda response, _: float(sum(response.encode()) % 3 == 0))
    engine = ScriptedEngine(seed=3, eos_rate=0.2)
    return Grower("actor-0", engine, ascii_settings(), scoring, SEED)


def team_of(model_dir):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.control import Control
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.team import Team

    learner = build_learner(
        model_dir,
        optimizer=OptimizerSettings(learning_rate=1e-2, warmup_steps=0),
        # of a file no token is fresh, whatever the weights were
        loss=LossSettings(correct_fresh=True),
        microbatch_tokens=128,
        seed=SEED,
    )
    return Team(learner, Control(timeout_s=30.0))


async def train(model_dir, folder, endpoint):
    """The weights after all steps."""
    folder.mkdir()
    team = team_of(model_dir)
    hello = Hello(name="learner-0", run_id="run")
    replay = BlockingRequester(
        endpoint, name="learner-0", owner="replay", hello=hello, resend_s=1.0
    )
    store, config_file = WeightStore(folder / "weights", keep=10), Path(model_dir) / "config.json"
    worker = Worker(
        team,
        replay,
        store,
        CheckpointStore(folder / "checkpoints", keep=1),
        publisher=FolderPublisher(store, team, torch.float32, config_file, 30.0),
        start=FRESH,
        rules=replace(RULES, num_steps=NUM_STEPS, eval_every=0, save_every=NUM_STEPS),
    )
    try:
        steps = await asyncio.to_thread(worker.run)
    finally:
        replay.close()
    assert steps == NUM_STEPS
    return {name: tensor.detach().clone() for name, tensor in team.export()}


async def train_live(model_dir, folder):
    async with (
        serve_replay(prompt=numbered_prompt, **QUEUE) as (_, endpoint),
        Requester(
            endpoint, name="actor-0", owner="replay", hello=Hello(name="actor-0", run_id="run")
        ) as requester,
        running(ActorWorker(ReplayClient(requester), grower()).run(concurrent_trees=3)),
    ):
        return await train(model_dir, folder, endpoint)


async def train_offline(model_dir, folder, trees):
    def make_feed(group):
        return TreeFeed(trees, epochs=1, max_tokens=512, queue=group.queue, keep=group.add)

    async with serve_replay(make_feed=make_feed, **QUEUE) as (_, endpoint):
        return await train(model_dir, folder, endpoint)


async def write_trees(path):
    """Have the stand-alone actor grow the prompts of the run, one after the other."""
    output = Output(path, Job({"out_form": "trees"}), str, overwrite=False, retry_failed=False)
    prompts = [numbered_prompt(index) for index in range(NUM_PROMPTS)]
    tally = Tally(NUM_PROMPTS, time.monotonic)
    await Generation(prompts, None, grower(), StillEngine(), output, tally, max_failed=1).run(1)
    output.close()
    return TreeFile(path, vocab_size=VOCAB_SIZE)


def differing(found, expected):
    return [name for name in expected if not torch.equal(found[name], expected[name])]


async def test_training_on_the_file_of_the_trees_ends_at_the_same_weights_bit_for_bit(
    model_dir, tmp_path
):
    live = await train_live(model_dir, tmp_path / "live")
    trees = await write_trees(tmp_path / "trees.jsonl")
    offline = await train_offline(model_dir, tmp_path / "offline", trees)
    assert live.keys() == offline.keys()
    assert differing(offline, live) == []
    initial = {name: tensor.detach().clone() for name, tensor in team_of(model_dir).export()}
    assert len(differing(live, initial)) == len(live), "something was learned"


async def test_log_probs_that_are_a_little_off_end_at_other_weights(model_dir, tmp_path):
    trees = await write_trees(tmp_path / "trees.jsonl")

    class Nudged:
        def __len__(self):
            return len(trees)

        def tree(self, index):
            tree = trees.tree(index)
            first, *others = tree.segments
            nudged = replace(first, behavior_logprobs=first.behavior_logprobs - np.float32(1e-3))
            return replace(tree, segments=(nudged, *others))

    one = await train_offline(model_dir, tmp_path / "one", trees)
    other = await train_offline(model_dir, tmp_path / "other", Nudged())
    assert differing(one, other)
