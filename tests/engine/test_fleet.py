"""Several servers that somebody else runs, as one engine of fixed weights."""

import asyncio
import contextlib

import aiohttp
import pytest

from tests.fakes import VOCAB_SIZE, FakeSGLang, loopback, running, until
from treepo_async.engine.fleet import RemoteFleet
from treepo_async.engine.remote import RemoteEngine
from treepo_async.errors import ConfigError, EngineError, WeightsError

NOWHERE = "http://127.0.0.1:9"


@contextlib.asynccontextmanager
async def fleet_of(*fakes, away_timeout_s=5.0):
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        yield RemoteFleet(
            [
                RemoteEngine(
                    fake.url,
                    session,
                    vocab_size=VOCAB_SIZE,
                    context_length=60,
                    away_timeout_s=away_timeout_s,
                )
                for fake in fakes
            ]
        )


async def test_servers_of_the_same_weights_are_used_and_others_are_refused():
    async with FakeSGLang() as one, FakeSGLang(level=2.0) as two, fleet_of(one, two) as fleet:
        with pytest.raises(ConfigError, match=rf"{two.url} has other weights than {one.url}"):
            await fleet.start()
        two.level = 0.0
        assert await fleet.start() == "level 0.0"


async def test_one_that_is_away_is_no_death_and_the_last_one_is():
    async with FakeSGLang() as one, FakeSGLang() as two, fleet_of(one, two) as fleet:
        await fleet.start()
        async with running(fleet.watch()), running(fleet.deaths.wait()) as death:
            urls = [member.url for member in fleet.members]
            fleet.members[0].url = loopback().replace("tcp", "http")
            fleet.members[0].gate.doubt()
            await until(lambda: not fleet.members[0].gate.status().is_open)
            await asyncio.sleep(0.3)
            assert not death.done()
            await fleet.confirm()
            fleet.members[1].url = loopback().replace("tcp", "http")
            fleet.members[1].gate.doubt()
            await until(death.done)
            for member, url in zip(fleet.members, urls, strict=True):
                member.url = url
            await until(lambda: all(m.gate.status().is_open for m in fleet.members))
        assert fleet.num_restarts == 2


async def test_the_work_goes_on_without_one_that_stays_away_and_ends_without_all():
    async with (
        FakeSGLang() as one,
        FakeSGLang() as two,
        fleet_of(one, two, away_timeout_s=0.2) as fleet,
    ):
        await fleet.start()
        watching = asyncio.ensure_future(fleet.watch())
        fleet.members[0].url = NOWHERE
        fleet.members[0].gate.doubt()
        await asyncio.sleep(1.0)
        assert not watching.done()
        fleet.members[1].url = NOWHERE
        fleet.members[1].gate.doubt()
        with pytest.raises(ExceptionGroup) as caught:
            await watching
        assert caught.group_contains(EngineError, match="stayed away")


async def test_other_weights_at_one_of_them_are_noticed_when_work_is_delivered():
    async with FakeSGLang() as one, FakeSGLang() as two, fleet_of(one, two) as fleet:
        await fleet.start()
        two.version = "0.1"
        with pytest.raises(WeightsError, match="has other weights now"):
            await fleet.confirm()
