"""A server of one's own that dies, hangs and comes back, with every part but the server's process real."""

import asyncio
import contextlib
from dataclasses import dataclass

import aiohttp
import pytest

import treepo_async.engine.kept
from tests.fakes import BASE, FakeServer, FakeSGLang, publish_fake, running, until
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.kept import KeptEngine
from treepo_async.errors import EngineError
from treepo_async.weights.store import WeightStore


@dataclass
class House:
    fake: FakeSGLang
    server: FakeServer
    engine: KeptEngine
    client: EngineClient

    async def sample(self):
        sampling = SamplingSettings(1.0, ())
        (completion,) = await self.client.extend(
            [5, 6], num_runs=1, max_new_tokens=4, sampling=sampling
        )
        return completion


@contextlib.asynccontextmanager
async def house(tmp_path, *, max_restarts=3):
    folder = publish_fake(WeightStore(tmp_path / "weights", keep=3), BASE)
    async with FakeSGLang() as fake, aiohttp.ClientSession() as session, asyncio.timeout(20):
        server = FakeServer(fake, session, tmp_path / "sglang.log")
        engine = KeptEngine(server, folder, start_timeout_s=5, max_restarts=max_restarts)
        client = EngineClient(
            engine.url,
            engine.gate,
            session,
            namespace="n",
            vocab_size=128,
            request_timeout_s=5,
            update_mode=None,
        )
        yield House(fake, server, engine, client)


async def test_it_starts_the_server_and_gives_the_checksum_of_its_weights(tmp_path):
    async with house(tmp_path) as it:
        assert await it.engine.start() == "level 0.0"
        assert it.server.starts[0][1] == "0.0"
        async with running(it.engine.watch()):
            completion = await it.sample()
        assert completion.run.spans[0].policy_version == BASE
        await it.engine.stop()
        assert not it.server.is_alive()


async def test_a_dead_server_is_started_again_and_requests_wait_for_it(tmp_path):
    async with house(tmp_path) as it:
        await it.engine.start()
        async with running(it.engine.watch()), running(it.engine.deaths.wait()) as death:
            await asyncio.sleep(0)
            it.server.die()
            await death
            assert len((await it.sample()).run) == 4
        assert len(it.server.starts) == 2
        assert it.engine.num_restarts == 1


async def test_a_lost_request_is_sent_again_once_the_server_is_seen_to_be_there(tmp_path):
    async with house(tmp_path) as it:
        await it.engine.start()
        it.fake.generate_faults.append("drop")
        async with running(it.engine.watch()):
            assert len((await it.sample()).run) == 4
        assert it.engine.num_restarts == 0


async def test_a_server_that_lives_and_does_not_answer_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(treepo_async.engine.kept, "UNANSWERED_S", 0.2)
    async with house(tmp_path) as it:
        await it.engine.start()

        async def hangs():
            if len(it.server.starts) == 1:
                raise EngineError("no answer")
            return True

        it.server.is_idle = hangs
        it.engine.gate.doubt()
        async with running(it.engine.watch()):
            await until(lambda: it.engine.num_restarts == 1)
            await it.sample()


async def test_restarts_without_work_in_between_come_to_an_end_that_says_why(tmp_path):
    async with house(tmp_path, max_restarts=2) as it:
        await it.engine.start()
        watching = asyncio.ensure_future(it.engine.watch())
        for _ in range(3):
            it.server.die()
            await until(lambda: it.server.is_alive() or watching.done())
        with pytest.raises(EngineError, match=r"gave up after 2 restarts .*SGLang died\na line of"):
            await watching


async def test_work_that_is_delivered_makes_earlier_restarts_forgotten(tmp_path):
    async with house(tmp_path, max_restarts=1) as it:
        await it.engine.start()
        async with running(it.engine.watch()) as watching:
            for number in (1, 2, 3):
                it.server.die()
                await until(lambda n=number: len(it.server.starts) == n + 1 or watching.done())
                it.engine.delivered()
            await it.sample()


async def test_a_server_that_does_not_start_again_is_counted_on_trial_too(tmp_path):
    async with house(tmp_path, max_restarts=1) as it:
        await it.engine.start()
        publish_fake(WeightStore(tmp_path / "other", keep=1), BASE._replace(step=3))
        it.engine.model_dir = tmp_path / "other" / "0.3"
        it.server.die()
        with it.engine.on_trial(), pytest.raises(EngineError, match="gave up after 1 restarts"):
            await it.engine.watch()
        assert it.engine.num_restarts == 2


async def test_a_server_that_comes_back_with_other_weights_is_not_used(tmp_path):
    async with house(tmp_path, max_restarts=1) as it:
        await it.engine.start()
        publish_fake(WeightStore(tmp_path / "other", keep=1), BASE._replace(step=3))
        it.engine.model_dir = tmp_path / "other" / "0.3"
        it.server.die()
        with pytest.raises(EngineError, match="gave other weights than before"):
            await it.engine.watch()
