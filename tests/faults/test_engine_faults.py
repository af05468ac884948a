"""An engine that hangs, lies, dies of a prompt, or is slow on one path: actors, engine host and replay as they are, on a fake SGLang."""

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass, replace

import aiohttp
import pytest

import treepo_async.actor.worker
import treepo_async.engine.client
from tests.fakes import (
    BASE,
    VOCAB_SIZE,
    FakeServer,
    FakeSGLang,
    ascii_settings,
    events_in,
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
from treepo_async.engine.publications import FolderPublications
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.replay.entry import State
from treepo_async.weights.store import WeightStore
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import Requester

BATCH = 4
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
    hang_timeout_s=1.0,
)

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(treepo_async.engine.client, "RETRY_S", 0.01)
    monkeypatch.setattr(treepo_async.actor.worker, "BACK_OFF_S", 0.05)


@dataclass
class Site:
    """An engine host with its server, and actors on it."""

    sglang: FakeSGLang
    server: FakeServer
    host: Host
    workers: list


@contextlib.asynccontextmanager
async def site(tmp_path, endpoint, *, num_actors=1, timeout_s=30.0, request_timeout_s=10.0):
    gate_endpoint = loopback()
    async with (
        FakeSGLang() as sglang,
        aiohttp.ClientSession() as session,
        contextlib.AsyncExitStack() as stack,
    ):
        server = FakeServer(sglang, session, tmp_path / "sglang.log")
        keeper = GateKeeper(gate_endpoint)
        stack.callback(keeper.shut)
        host = Host(
            server=server,
            keeper=keeper,
            publications=FolderPublications(WeightStore(tmp_path / "weights", keep=4)),
            rules=RULES,
            base_dir=publish_fake(WeightStore(tmp_path / "base", keep=1), BASE),
            evaluates=False,
            evaluates_base=False,
        )
        await stack.enter_async_context(running(host.run()))
        workers = []
        for i in range(num_actors):
            name = f"actor-{i}"
            gate = GateClient(gate_endpoint, name=name, evaluates=False, timeout_s=10)
            await stack.enter_async_context(gate)
            engine = EngineClient(
                server.url,
                gate,
                session,
                namespace="run",
                vocab_size=VOCAB_SIZE,
                request_timeout_s=request_timeout_s,
            )
            hello = Hello(name=name, run_id="run")
            requester = Requester(endpoint, name=name, owner="replay", hello=hello)
            replay = ReplayClient(await stack.enter_async_context(requester))
            await replay.hello(hello, timeout_s=5)
            settings = replace(ascii_settings(), timeout_s=timeout_s)
            grower = Grower(name, engine, settings, scoring_by(lambda *_: 1.0), 0)
            workers.append(Worker(replay, grower, Health(sick_after=50)))
        yield Site(sglang, server, host, workers)


@contextlib.asynccontextmanager
async def growing(it, *, concurrent_trees=2):
    async with contextlib.AsyncExitStack() as stack:
        for worker in it.workers:
            await stack.enter_async_context(running(worker.run(concurrent_trees)))
        yield


def states(server):
    return Counter(entry.state for entry in server.queue.order.kept())


def is_full(server):
    return lambda: states(server)[State.ACCEPTED] == BATCH


def alarms(capsys):
    return [event["alarm"] for event in events_in(capsys.readouterr().out, "alarm")]


async def test_a_server_that_hangs_is_started_again_and_every_tree_comes(tmp_path, capsys):
    async with (
        serve_replay(prompts_per_batch=BATCH) as (server, endpoint),
        site(tmp_path, endpoint) as it,
        asyncio.timeout(RUN_S),
    ):
        it.sglang.is_hung = True
        async with growing(it):
            await until(lambda: len(it.server.starts) == 2)
            await until(is_full(server), timeout_s=RUN_S)
        assert server.queue.reasons.total() == 0
        assert it.host.applied == BASE
    told = events_in(capsys.readouterr().out, "alarm")
    assert [event["alarm"] for event in told] == ["engine restarted"]
    assert told[0]["detail"].startswith("SGLang hangs: no sign of life for 1 s")


async def test_a_request_that_is_never_answered_moves_on_after_its_own_deadline(tmp_path):
    async with (
        serve_replay(prompts_per_batch=BATCH) as (server, endpoint),
        site(tmp_path, endpoint, request_timeout_s=0.3) as it,
        asyncio.timeout(RUN_S),
    ):
        it.sglang.generate_faults.extend(["hang"] * 9)
        async with growing(it):
            await until(is_full(server), timeout_s=RUN_S)
        assert len(it.server.starts) == 1, "its counters moved"
        assert len(it.sglang.bodies("/abort_request")) >= 9, "nobody decodes for nothing"


@pytest.mark.parametrize("fault", ["500", "garbage", "not_understood", "short", "nan"])
async def test_bad_answers_cost_leases_but_neither_prompts_nor_the_run(tmp_path, fault):
    async with (
        serve_replay(prompts_per_batch=BATCH, max_attempts=20) as (server, endpoint),
        site(tmp_path, endpoint) as it,
        asyncio.timeout(RUN_S),
    ):
        it.sglang.generate_faults.extend([fault] * 12)
        async with growing(it):
            await until(is_full(server), timeout_s=RUN_S)
        assert sum(server.queue.reasons.values()) >= 1, "some leases were given up"
        assert server.queue.ledger().get("quarantined", 0) == 0
        trees = [decode_tree(server.store.read(i)) for i in server.queue.order.live]
        assert [tree.prompt.id for tree in trees] == ["p0", "p1", "p2", "p3"]
        assert {len(tree.leaves) for tree in trees} == {6}


async def test_a_prompt_that_kills_the_server_is_buried_and_takes_no_other_one_with_it(
    tmp_path, capsys
):
    folder = tmp_path / "replay"
    folder.mkdir()
    async with (
        serve_replay(prompts_per_batch=BATCH, folder=folder) as (server, endpoint),
        site(tmp_path, endpoint, num_actors=2) as it,
        asyncio.timeout(RUN_S),
    ):
        # of prompt p1
        it.sglang.dies_of = 11
        it.sglang.latency_s = 0.02
        async with growing(it):
            await until(is_full(server), timeout_s=RUN_S)
        lines = (folder / "dead_letters.jsonl").read_text().splitlines()
        assert server.queue.ledger()["quarantined"] == len(lines) == 1
        buried = json.loads(lines[0])
        assert (buried["prompt_id"], buried["attempts"]) == ("p1", 3)
        assert buried["actors"] == ["actor-0", "actor-1"]
        ids = [decode_tree(server.store.read(i)).prompt.id for i in server.queue.order.live]
        assert ids[:BATCH] == ["p0", "p2", "p3", "p4"]
    assert alarms(capsys).count("prompt lost") == 1


async def test_one_slow_path_does_not_hold_its_batch_up_and_a_resumed_run_is_not_wedged_on_it(
    tmp_path,
):
    folder = tmp_path / "replay"
    folder.mkdir()
    async with (
        serve_replay(prompts_per_batch=BATCH, folder=folder) as (server, endpoint),
        site(tmp_path, endpoint, timeout_s=1.0) as it,
        asyncio.timeout(RUN_S),
    ):
        # in a later round of the first tree: a leaf is there by then
        it.sglang.generate_faults.extend([*[""] * 10, "hang"])
        async with growing(it, concurrent_trees=1):
            await until(is_full(server), timeout_s=RUN_S)
        assert server.queue.reasons.total() == 0, "no lease was given up"
    async with serve_replay(prompts_per_batch=BATCH, folder=folder) as (server, _):
        trees = [decode_tree(server.store.read(i)) for i in server.queue.order.live]
        first, *others = [int(tree.is_whole_L.sum()) for tree in trees]
        assert 1 <= first < 6
        assert others == [6, 6, 6]
        assert any("cut off at the deadline" in note for note in trees[0].provenance.notes)
        assert len(server.queue.next_batch(0) or []) == BATCH
