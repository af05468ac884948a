"""Actors that come, go, and die while a run trains: no prompt is lost or trained twice, and the learner never starts anew."""

import asyncio
import contextlib
import time

import pytest

import treepo_async.actor.worker
from tests.fakes import (
    ScriptedEngine,
    ascii_settings,
    numbered_prompt,
    running,
    scoring_by,
    serve_replay,
    until,
)
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker
from treepo_async.replay.entry import State
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import AskBatch, Batch, Hello, Published, Retired, Trained
from treepo_async.wire.sockets import Requester

BATCH = 4
RUN_S = 40.0

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(treepo_async.actor.worker, "BEAT_S", 0.05)


class SlowEngine(ScriptedEngine):
    """Takes a moment for every request, so that trees are being grown whenever one looks."""

    async def extend(self, prefix, **options):
        await asyncio.sleep(0.01)
        return await super().extend(prefix, **options)


@contextlib.asynccontextmanager
async def actor(endpoint, name, engine=None, *, concurrent_trees=2):
    """An actor that works for as long as the context lasts, and then leaves in order."""
    hello = Hello(name=name, run_id="run")
    async with Requester(
        endpoint, name=name, owner="replay", hello=hello, resend_s=0.5
    ) as requester:
        grower = Grower(
            name, engine or SlowEngine(), ascii_settings(), scoring_by(lambda *_: 1.0), 0
        )
        async with running(Worker(ReplayClient(requester), grower).run(concurrent_trees)):
            yield


class Learner:
    """Asks for batches, and publishes after each."""

    def __init__(self, endpoint):
        self.endpoint = endpoint
        self.steps = []
        """Lease ids of each."""
        self.names = []
        """Who grew the trees."""

    async def run(self, num_steps):
        hello = Hello(name="learner-0", run_id="run")
        async with Requester(
            self.endpoint, name="learner-0", owner="replay", hello=hello
        ) as replay:
            for step in range(num_steps):
                batch, frames = await self._batch(replay, step)
                self.steps.append(batch.lease_ids)
                size = batch.frames_per_tree
                trees = [decode_tree(frames[i : i + size]) for i in range(0, len(frames), size)]
                self.names += [tree.provenance.actor for tree in trees]
                said = [
                    Trained(step=step, lineage=0, digest=str(step)),
                    Published(step=step + 1, lineage=0, consumed_step=step),
                ]
                if step > 0:
                    said.append(Retired(step=step - 1))
                for message in said:
                    await replay.ask(message, timeout_s=10, wait="an answer")

    async def _batch(self, replay, step):
        while True:
            ask = AskBatch(step=step, lineage=0, wait_s=1.0)
            answer, frames = await replay.ask(ask, timeout_s=10, wait="a batch")
            if isinstance(answer, Batch):
                return answer, frames


def check_whole(server, learner, num_steps):
    """Every prompt was trained once, in order, and nothing else became of any."""
    ids = [lease_id for step in learner.steps for lease_id in step]
    assert ids == [f"{i:09d}" for i in range(num_steps * BATCH)]
    server.queue.check_integrity()
    ledger = server.queue.ledger()
    assert ledger["trained"] == num_steps * BATCH
    assert sum(ledger.get(state, 0) for state in ("dropped", "quarantined", "leased")) == 0


async def test_actors_come_and_go_between_one_and_four_while_one_learner_trains():
    steps = 12
    rules = {"prompts_per_batch": BATCH, "max_staleness": 1, "num_batches": steps}
    async with (
        serve_replay(**rules) as (server, endpoint),
        actor(endpoint, "actor-0"),
        asyncio.timeout(RUN_S),
    ):
        learner = Learner(endpoint)
        async with running(learner.run(steps)) as work:
            await until(lambda: len(learner.steps) >= 2, timeout_s=RUN_S)
            async with contextlib.AsyncExitStack() as guests:
                for i in range(3):
                    await guests.enter_async_context(actor(endpoint, f"guest-x-1-{i}"))
                await until(lambda: len({*learner.names}) == 4, timeout_s=RUN_S)
                at = len(learner.steps)
            await until(lambda: len(server.queue.actors) == 1)
            await work
        assert at < steps, "they left midway"
        check_whole(server, learner, steps)
        assert server.queue.reasons.total() == 0, "no attempt was lost over it"


async def test_a_process_that_takes_the_place_of_a_dead_one_of_its_name_gets_its_leases_at_once():
    rules = {"prompts_per_batch": BATCH, "num_batches": 1, "lease_timeout_s": 600.0}
    never = {numbered_prompt(i).token_ids[0]: asyncio.Event() for i in range(BATCH)}
    async with (
        serve_replay(**rules) as (server, endpoint),
        asyncio.timeout(RUN_S),
        contextlib.AsyncExitStack() as dead,
    ):
        # it hangs for good, and does not even fall silent
        await dead.enter_async_context(actor(endpoint, "actor-0", ScriptedEngine(held=never)))
        await until(lambda: sum(e.state is State.LEASED for e in server.queue.order.kept()) == 2)
        async with actor(endpoint, "actor-0"):
            learner = Learner(endpoint)
            await learner.run(1)
            check_whole(server, learner, 1)
            assert +server.queue.reasons == {"actor_ended": 2}
            with contextlib.suppress(ExceptionGroup):
                # the earlier process is told at its next beat, and ends
                await dead.aclose()


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
async def test_a_jump_of_the_wall_clock_moves_no_lease(monkeypatch, jump_s):
    steps = 3
    rules = {"prompts_per_batch": BATCH, "max_staleness": 1, "num_batches": steps}
    wall = time.time
    async with (
        serve_replay(lease_timeout_s=5.0, **rules) as (server, endpoint),
        actor(endpoint, "actor-0"),
        asyncio.timeout(RUN_S),
    ):
        learner = Learner(endpoint)
        async with running(learner.run(steps)) as work:
            await until(lambda: len(learner.steps) >= 1, timeout_s=RUN_S)
            monkeypatch.setattr(time, "time", lambda: wall() + jump_s)
            await work
        check_whole(server, learner, steps)
        assert server.queue.reasons.total() == 0


async def test_the_queues_own_clock_may_jump_ahead_and_costs_attempts_but_no_prompt():
    steps = 3
    rules = {"prompts_per_batch": BATCH, "max_staleness": 1, "num_batches": steps}
    async with (
        serve_replay(lease_timeout_s=5.0, max_attempts=9, **rules) as (server, endpoint),
        actor(endpoint, "actor-0"),
        asyncio.timeout(RUN_S),
    ):
        learner = Learner(endpoint)
        async with running(learner.run(steps)) as work:
            await until(lambda: len(learner.steps) >= 1, timeout_s=RUN_S)
            server.clock = lambda: time.monotonic() + 3600.0
            await work
        check_whole(server, learner, steps)
        assert server.queue.published == steps
