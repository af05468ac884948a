"""A server that somebody else runs: what it must be, and what may not happen to it."""

import asyncio
import contextlib

import aiohttp
import pytest

from tests.fakes import VOCAB_SIZE, FakeSGLang, loopback, running, until
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.fixed import VERSION
from treepo_async.engine.remote import RemoteEngine
from treepo_async.errors import ConfigError, EngineError, WeightsError


@contextlib.asynccontextmanager
async def remote(fake=None, *, url=None, vocab_size=VOCAB_SIZE, context=60, away_timeout_s=5.0):
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        yield RemoteEngine(
            url or fake.url,
            session,
            vocab_size=vocab_size,
            context_length=context,
            away_timeout_s=away_timeout_s,
        )


async def sample(engine):
    client = EngineClient(
        engine.url,
        engine.gate,
        engine.session,
        namespace="n",
        vocab_size=VOCAB_SIZE,
        request_timeout_s=5,
        update_mode=None,
    )
    sampling = SamplingSettings(1.0, ())
    (completion,) = await client.extend([5], num_runs=1, max_new_tokens=4, sampling=sampling)
    return completion


async def test_a_server_that_fits_is_used_whatever_it_calls_its_weights():
    async with FakeSGLang(version="default") as fake, remote(fake) as engine:
        assert await engine.start() == "level 0.0"
        completion = await sample(engine)
        await engine.confirm()
    assert [tuple(span) for span in completion.run.spans] == [(VERSION, 4, False)]


async def test_where_nothing_answers_the_key_is_named():
    async with remote(url=loopback().replace("tcp", "http")) as engine:
        with pytest.raises(ConfigError, match=r"engine\.url=http://127.*model_info got no answer"):
            await engine.start()


@pytest.mark.parametrize(
    ("info", "options", "reason"),
    [
        ({"version": "0.5.9"}, {}, r"is SGLang 0\.5\.9, 0\.5\.23 or later is needed"),
        ({}, {"context": 65}, r"context is 64 tokens, .* need up to 65"),
        ({"context_length": None, "max_req_input_len": 50}, {}, "context is 50 tokens"),
        ({}, {"vocab_size": 100}, r"vocabulary has 128 tokens, that of model\.path 100"),
        ({}, {"vocab_size": 384}, r"vocabulary has 128 tokens, that of model\.path 384"),
        ({"is_generation": False}, {}, "no model that generates"),
    ],
)
async def test_a_server_that_does_not_fit_is_refused_with_the_way_out(info, options, reason):
    async with FakeSGLang(info=info) as fake, remote(fake, **options) as engine:
        with pytest.raises(ConfigError, match=reason):
            await engine.start()


async def test_weights_of_another_name_are_noticed_when_work_is_delivered():
    async with FakeSGLang() as fake, remote(fake) as engine:
        await engine.start()
        fake.version = "0.1"
        with pytest.raises(WeightsError, match=r"has other weights now: .*0\.1.*, was .*0\.0"):
            await engine.confirm()


async def test_weights_that_change_under_a_request_are_noticed():
    async with FakeSGLang() as fake, remote(fake) as engine:
        await engine.start()
        spans = [
            {"version": "a", "start": 0, "end": 2},
            {"version": "b", "start": 2, "end": 4},
        ]
        fake.weight_versions = spans
        with pytest.raises(EngineError, match="weights changed from a to b under a request"):
            await sample(engine)


async def test_a_server_that_went_away_is_waited_for():
    async with FakeSGLang() as fake, remote(fake) as engine:
        await engine.start()
        async with running(engine.watch()), running(engine.deaths.wait()) as death:
            await asyncio.sleep(0)
            url, engine.url = engine.url, loopback().replace("tcp", "http")
            engine.gate.doubt()
            await death
            engine.url = url
            assert len((await sample(engine)).run) == 4
        assert engine.num_restarts == 1


async def test_a_server_that_comes_back_with_other_weights_ends_the_work():
    async with FakeSGLang() as fake, remote(fake) as engine:
        await engine.start()
        url, engine.url = engine.url, loopback().replace("tcp", "http")
        engine.gate.doubt()
        async with running(engine.deaths.wait()) as death:
            watching = asyncio.ensure_future(engine.watch())
            await death
            fake.level = 3.0
            engine.url = url
            with pytest.raises(WeightsError, match=r"came back with other weights \(level 3\.0\)"):
                await watching


async def test_a_server_that_stays_away_ends_the_work():
    async with FakeSGLang() as fake, remote(fake, away_timeout_s=0.3) as engine:
        await engine.start()
        engine.url = loopback().replace("tcp", "http")
        engine.gate.doubt()
        with pytest.raises(
            EngineError, match=r"stayed away for 0\.3 s \(engine\.start_timeout_s\)"
        ):
            await engine.watch()


async def test_a_request_that_was_lost_alone_costs_nothing():
    async with FakeSGLang() as fake, remote(fake) as engine:
        await engine.start()
        fake.generate_faults.append("drop")
        async with running(engine.watch()):
            await sample(engine)
            await until(lambda: not engine.gate.is_doubted())
        assert engine.num_restarts == 0
