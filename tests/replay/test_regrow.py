"""An accepted tree that a resumed run finds too old: replay, an actor and its client, with real sockets."""

import contextlib
from dataclasses import replace

import pytest

from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    events_in,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
)
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker
from treepo_async.replay.batches import FRAMES_PER_TREE
from treepo_async.types import ROOT, PolicyVersion
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import AskBatch, Batch, Hello, Published
from treepo_async.wire.sockets import Requester

RUN_S = 20.0
NUM_STEPS = 3


def grower(engine):
    return Grower("actor-0", engine, ascii_settings(), scoring_by(lambda *_: 1.0), seed=0)


@contextlib.asynccontextmanager
async def client(endpoint, name, run_id):
    hello = Hello(name=name, run_id=run_id)
    async with Requester(endpoint, name=name, owner="replay", hello=hello) as requester:
        await ReplayClient(requester).hello(hello, timeout_s=RUN_S)
        yield requester


async def ask_batch(learner, step, lineage):
    answer, frames = await learner.ask(
        AskBatch(step=step, lineage=lineage, wait_s=RUN_S), timeout_s=RUN_S, wait="a batch"
    )
    assert isinstance(answer, Batch)
    return [
        decode_tree(frames[i : i + FRAMES_PER_TREE]) for i in range(0, len(frames), FRAMES_PER_TREE)
    ]


async def publish(learner, step, lineage):
    message = Published(step=step, lineage=lineage, consumed_step=step - 1)
    await learner.ask(message, timeout_s=RUN_S, wait="an answer to Published")


async def grown_at_two_steps(index):
    """The tree of a prompt whose last branch, and what hangs on it, is of step 2 and the rest of step 0."""
    tree = await grower(ScriptedEngine(seed=6, eos_rate=0.02)).grow(
        numbered_prompt(index), lease_id=f"{index:09d}"
    )
    young = {max(i for i, s in enumerate(tree.segments) if s.parent == ROOT)}
    for i, segment in enumerate(tree.segments):
        young |= {i} if segment.parent in young else set()
    segments = tuple(
        replace(s, policy_version=PolicyVersion(0, 2)) if i in young else s
        for i, s in enumerate(tree.segments)
    )
    return replace(tree, segments=segments), sum(len(segments[i]) for i in young)


async def first_run(folder):
    """Two steps are trained; the tree of the third is in, and partly two steps old."""
    rules = {"prompts_per_batch": 1, "num_batches": NUM_STEPS, "max_staleness": 2}
    async with (
        serve_replay(folder=folder, run_id="first", **rules) as (_, endpoint),
        client(endpoint, "actor-0", "first") as requester,
        client(endpoint, "learner", "first") as learner,
    ):
        actor = ReplayClient(requester)
        for _ in range(NUM_STEPS - 1):
            lease, _ = await actor.lease()
            tree = await grower(ScriptedEngine()).grow(
                numbered_prompt(int(lease.lease_id)), lease_id=lease.lease_id
            )
            await actor.put(lease, tree)
        lease, _ = await actor.lease()
        for step in range(NUM_STEPS - 1):
            await ask_batch(learner, step, 0)
            await publish(learner, step + 1, 0)
        tree, num_young = await grown_at_two_steps(NUM_STEPS - 1)
        await actor.put(lease, tree)
    return tree, num_young


@pytest.mark.parametrize("regrow", [True, False])
async def test_a_resumed_run_with_a_tighter_bound_trains_no_token_that_is_too_old(
    tmp_path, regrow, capfd
):
    old, num_young = await first_run(tmp_path)
    assert 0 < num_young < old.num_tokens
    engine = ScriptedEngine(seed=9, version=PolicyVersion(1, 2))
    rules = {"prompts_per_batch": 1, "num_batches": NUM_STEPS, "max_staleness": 0}
    async with (
        serve_replay(folder=tmp_path, run_id="second", resume_step=2, regrow=regrow, **rules) as (
            server,
            endpoint,
        ),
        client(endpoint, "actor-0", "second") as requester,
        client(endpoint, "learner", "second") as learner,
        running(Worker(ReplayClient(requester), grower(engine)).run(1)),
    ):
        await publish(learner, 2, 1)
        (tree,) = await ask_batch(learner, 2, 1)
        ledger = server.queue.ledger()
    tree.check()
    assert min(s.policy_version.step for s in tree.segments) == 2
    assert len(tree.leaves) == 6
    note = f"regrown: {num_young} of {old.num_tokens} tokens kept"
    assert tree.provenance.notes == ((note,) if regrow else ())
    kept = [s for s in tree.segments if s.policy_version == PolicyVersion(0, 2)]
    assert sum(map(len, kept)) == (num_young if regrow else 0)
    sampled = tree.num_tokens - sum(map(len, kept))
    assert tree.provenance.decoded_tokens == sampled + tree.provenance.wasted_tokens
    assert ledger["reason/stale_accepted"] == 1
    assert ledger["consumed"] == 1
    assert events_in(capfd.readouterr().out, "tree")
