"""Two engines with their hosts, one actor process on both, replay: one engine dies in the middle of trees, and comes back."""

import asyncio
import contextlib
import time
from dataclasses import dataclass, replace

import aiohttp
import pytest

import treepo_async.actor.worker
import treepo_async.engine.client
import treepo_async.engine.pool
from tests.fakes import (
    BASE,
    VOCAB_SIZE,
    FakeServer,
    FakeSGLang,
    ascii_settings,
    loopback,
    publish_fake,
    running,
    scoring_by,
    serve_replay,
    until,
)
from treepo_async.actor.grow import Grower
from treepo_async.actor.health import Health
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import Worker
from treepo_async.engine.client import EngineClient
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.pool import EnginePool, Member
from treepo_async.engine.publications import FolderPublications
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.replay.entry import State
from treepo_async.weights.store import WeightStore
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import Requester

BATCH = 6
RUN_S = 40.0
RULES = HostRules(
    update_mode=UpdateMode.DRAIN,
    start_timeout_s=5,
    drain_timeout_s=5,
    update_timeout_s=2,
    eval_timeout_s=5,
    max_restarts=10,
    max_staleness=8,
    gap_alarm=1e-4,
)

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(treepo_async.engine.client, "RETRY_S", 0.01)
    monkeypatch.setattr(treepo_async.engine.pool, "REST_S", 0.2)
    monkeypatch.setattr(treepo_async.actor.worker, "BACK_OFF_S", 0.05)


class SlowServer(FakeServer):
    """One that starts again when it may."""

    def __init__(self, *args):
        super().__init__(*args)
        self.may_start = asyncio.Event()

    async def start(self, model_dir, weight_version, *, timeout_s):
        if self.starts:
            await self.may_start.wait()
        return await super().start(model_dir, weight_version, timeout_s=timeout_s)


@dataclass
class Site:
    """Engines, and an actor on all of them."""

    servers: list
    pool: EnginePool
    worker: Worker

    def kill(self, number):
        """End a server, and what runs in it."""
        server = self.servers[number]
        server.is_running = False
        server.fake._lost |= server.fake.running.keys()
        for abort in server.fake.running.values():
            abort.set()

    def served(self, number):
        return len(self.servers[number].fake.bodies("/generate"))


@contextlib.asynccontextmanager
async def site(tmp_path, endpoint, *, number=2):
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        servers, members = [], []
        for i in range(number):
            folder = tmp_path / f"engine-{i}"
            folder.mkdir()
            sglang = await stack.enter_async_context(FakeSGLang(latency_s=0.05))
            servers.append(SlowServer(sglang, session, folder / "sglang.log"))
            gate_endpoint = loopback()
            keeper = GateKeeper(gate_endpoint)
            stack.callback(keeper.shut)
            host = Host(
                server=servers[i],
                keeper=keeper,
                publications=FolderPublications(WeightStore(folder / "weights", keep=4)),
                rules=RULES,
                base_dir=publish_fake(WeightStore(folder / "base", keep=1), BASE),
                evaluates=False,
                evaluates_base=False,
            )
            await stack.enter_async_context(running(host.run()))
            gate = GateClient(
                gate_endpoint, name="actor-0", evaluates=False, timeout_s=20, is_one_of_many=True
            )
            await stack.enter_async_context(gate)
            client = EngineClient(
                servers[i].url,
                gate,
                session,
                namespace="run",
                vocab_size=VOCAB_SIZE,
                request_timeout_s=10,
            )
            members.append(Member(servers[i].url, client, gate))
        pool = EnginePool(members, timeout_s=20)
        await stack.enter_async_context(running(pool.watch()))
        hello = Hello(name="actor-0", run_id="run")
        requester = Requester(endpoint, name="actor-0", owner="replay", hello=hello)
        replay = ReplayClient(await stack.enter_async_context(requester))
        await replay.hello(hello, timeout_s=5)
        settings = replace(ascii_settings(), timeout_s=30.0)
        grower = Grower("actor-0", pool, settings, scoring_by(lambda *_: 1.0), 0)
        await until(lambda: all(member.admits(0) for member in members))
        yield Site(servers, pool, Worker(replay, grower, Health(sick_after=50)))


def accepted(server):
    entries = server.queue.order.kept()
    return sum(entry.state is State.ACCEPTED for entry in entries)


def trees(server):
    return [decode_tree(server.store.read(i)) for i in server.queue.order.live]


async def test_trees_of_an_engine_that_dies_end_on_the_other_and_it_is_used_again_when_it_is_back(
    tmp_path,
):
    async with (
        serve_replay(prompts_per_batch=BATCH) as (server, endpoint),
        site(tmp_path, endpoint) as it,
        asyncio.timeout(RUN_S),
    ):
        async with running(it.worker.run(BATCH)):
            await until(lambda: all(it.served(i) > BATCH for i in range(2)))
            it.kill(0)
            await until(lambda: accepted(server) == BATCH, timeout_s=RUN_S)
        assert server.queue.reasons.total() == 0, "no lease was given up"
        costs = [tree.provenance for tree in trees(server)]
        assert sum(cost.num_migrated for cost in costs) > 0
        assert sum(cost.moved_tokens for cost in costs) > 0
        assert {len(tree.leaves) for tree in trees(server)} == {6}
        assert not it.servers[0].is_alive(), "nobody waited for it"
        it.servers[0].may_start.set()
        await until(lambda: not it.pool.members[0].is_out(0, time.monotonic()))
        begun = [await it.pool.warm([5], sampling=ascii_settings().sampling) for _ in range(4)]
        assert it.servers[0].url in {place.engine for place in begun}


async def test_without_a_death_nothing_migrates(tmp_path):
    async with (
        serve_replay(prompts_per_batch=BATCH) as (server, endpoint),
        site(tmp_path, endpoint) as it,
        asyncio.timeout(RUN_S),
    ):
        async with running(it.worker.run(BATCH)):
            await until(lambda: accepted(server) == BATCH, timeout_s=RUN_S)
        costs = [tree.provenance for tree in trees(server)]
        assert sum(cost.num_migrated for cost in costs) == 0
        assert sum(cost.moved_tokens for cost in costs) == 0
        assert min(it.served(0), it.served(1)) > 0


async def test_with_one_engine_in_the_pool_its_death_is_waited_for(tmp_path):
    async with (
        serve_replay(prompts_per_batch=BATCH) as (server, endpoint),
        site(tmp_path, endpoint, number=1) as it,
        asyncio.timeout(RUN_S),
    ):
        async with running(it.worker.run(BATCH)):
            await until(lambda: it.served(0) > BATCH)
            it.kill(0)
            it.servers[0].may_start.set()
            await until(lambda: accepted(server) == BATCH, timeout_s=RUN_S)
        assert len(it.servers[0].starts) == 2
        assert server.queue.reasons.total() == 0
