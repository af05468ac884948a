"""A server that somebody else runs, in the hands of an engine host."""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

import treepo_async.engine.adopted
from tests.fakes import (
    BASE,
    VOCAB_SIZE,
    FakeSGLang,
    events_in,
    loopback,
    publish_fake,
    running,
    until,
)
from treepo_async.engine.adopted import AdoptedServer, Needs
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.publications import FolderPublications
from treepo_async.engine.server import ServerOptions
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import ConfigError, EngineError
from treepo_async.types import PolicyVersion
from treepo_async.weights.store import WeightStore

FITS = {"dtype": "float32"}
NEEDS = Needs(vocab_size=VOCAB_SIZE, context_length=60, dtype="float32", updates_under_load=False)
OPTIONS = ServerOptions(0, "float32", 60, None, 8, 64, Path("unused.log"))
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


@contextlib.asynccontextmanager
async def adopted(url, needs=NEEDS):
    async with aiohttp.ClientSession() as session, asyncio.timeout(20):
        yield AdoptedServer(url, OPTIONS, needs, session)


def base(folder):
    """A model whose weights are of level 0."""
    return publish_fake(WeightStore(folder / "base", keep=1), BASE)


async def test_what_it_did_before_is_ended_and_the_runs_weights_are_loaded_under_their_name(
    tmp_path,
):
    async with FakeSGLang(info=FITS, version="default", level=7.0) as fake:
        fake.paused = "retract"
        async with adopted(fake.url) as server:
            assert not server.is_alive()
            await server.start(base(tmp_path), "0.0", timeout_s=5)
            assert server.is_alive()
            assert await server.checksum(timeout_s=1) == "level 0.0"
    assert (fake.version, fake.paused) == ("0.0", "")
    (update,) = fake.bodies("/update_weights_from_disk")
    assert update["flush_cache"]
    paths = [path for path, _ in fake.calls]
    assert paths.index("/abort_request") < paths.index("/update_weights_from_disk")


async def test_it_is_left_running_and_not_paused(tmp_path):
    async with FakeSGLang(info=FITS) as fake, adopted(fake.url) as server:
        await server.start(base(tmp_path), "0.0", timeout_s=5)
        await server.pause("retract", timeout_s=1)
        await server.stop()
        assert fake.paused == ""
        assert await server._is_ready()


@pytest.mark.parametrize(
    ("info", "needs", "reason"),
    [
        ({"dtype": "bfloat16"}, {}, "computes in bfloat16, the run in float32; start it with"),
        ({"dtype": "auto"}, {}, "computes in auto"),
        (FITS, {"context_length": 65}, "context is 64 tokens"),
        (FITS, {"vocab_size": 384}, "vocabulary has 128 tokens"),
        (FITS, {"updates_under_load": True}, "without --enable-priority-scheduling"),
        (
            FITS | {"enable_priority_scheduling": True},
            {"updates_under_load": True},
            "without --disable-overlap-schedule",
        ),
    ],
)
async def test_one_that_does_not_fit_is_refused_before_its_weights_are_touched(
    tmp_path, info, needs, reason
):
    wanted = replace(NEEDS, **needs)
    async with FakeSGLang(info=info) as fake, adopted(fake.url, wanted) as server:
        with pytest.raises(ConfigError, match=rf"engine\.url=http.*{reason}"):
            await server.start(base(tmp_path), "0.0", timeout_s=5)
    assert not fake.bodies("/update_weights_from_disk")


async def test_where_nothing_answers_the_wait_ends_with_the_key(tmp_path):
    async with adopted(loopback().replace("tcp", "http")) as server:
        with pytest.raises(EngineError, match=r"no server was ready at engine\.url=http"):
            await server.start(base(tmp_path), "0.0", timeout_s=0.3)


async def test_only_one_that_refuses_connections_for_a_while_is_gone(tmp_path, monkeypatch):
    nowhere = loopback().replace("tcp", "http")
    async with FakeSGLang(info=FITS) as fake, adopted(fake.url) as server:
        await server.start(base(tmp_path), "0.0", timeout_s=5)
        there = server.url

        async def ask(url):
            server.url = url
            with contextlib.suppress(EngineError):
                await server.loads()

        await ask(nowhere)
        assert server.is_alive(), "of one connection"
        await ask(there)
        monkeypatch.setattr(treepo_async.engine.adopted, "REFUSED_S", 0.0)
        await ask(nowhere)
        assert server.is_alive(), "it has answered in between"
        await ask(nowhere)
        assert not server.is_alive()
        await ask(there)
        assert not server.is_alive(), "another process, with weights of its own"


async def test_one_that_goes_away_gets_the_last_good_weights_back_when_it_is_there_again(
    tmp_path, capsys, monkeypatch
):
    # nothing listens there: that need not be waited for
    monkeypatch.setattr(treepo_async.engine.adopted, "GONE_S", 600.0)
    monkeypatch.setattr(treepo_async.engine.adopted, "REFUSED_S", 0.3)
    store = WeightStore(tmp_path / "weights", keep=8)
    keeper = GateKeeper(loopback())
    try:
        async with FakeSGLang(info=FITS) as fake, adopted(fake.url) as server:
            host = Host(
                server=server,
                keeper=keeper,
                publications=FolderPublications(store),
                rules=RULES,
                base_dir=base(tmp_path),
                evaluates=False,
                evaluates_base=False,
            )
            async with running(host.run()):
                await until(server.is_alive)
                publish_fake(store, PolicyVersion(0, 1))
                await until(lambda: host.applied == PolicyVersion(0, 1))
                there, server.url = server.url, loopback().replace("tcp", "http")
                await until(lambda: not server.is_alive())
                # another process, with the weights it was started with
                fake.level, fake.version = 7.0, "default"
                server.url = there
                await until(server.is_alive)
                assert (fake.level, fake.version) == (1.0, "0.1")
                assert host.applied == PolicyVersion(0, 1)
            await server.stop()
    finally:
        keeper.shut()
    alarms = events_in(capsys.readouterr().out, "alarm")
    assert [alarm["alarm"] for alarm in alarms] == ["engine restarted"]
    assert host.applied > BASE
