"""What a real SGLang server says of itself, and that it is enough to tell whether it fits; and what a run makes of one."""

from dataclasses import replace

import aiohttp
import pytest
import pytest_asyncio

from tests.oracle import tiny_qwen2
from treepo_async.engine.adopted import AdoptedServer, Needs
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.fixed import VERSION
from treepo_async.engine.remote import RemoteEngine
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.errors import ConfigError
from treepo_async.process import free_ports

VOCAB_SIZE, CONTEXT = 128, 256
NEEDS = Needs(VOCAB_SIZE, CONTEXT, "float32", updates_under_load=False)
START_S = 150.0

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(START_S + 60),
    pytest.mark.asyncio(loop_scope="module"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remote")
    tiny_qwen2(tied=True).save_pretrained(folder)
    options = ServerOptions(
        port=free_ports(1)[0],
        dtype="float32",
        context_length=CONTEXT,
        max_total_tokens=8192,
        max_running_requests=16,
        prefill_chunk_tokens=1024,
        log_file=folder / "sglang.log",
    )
    async with aiohttp.ClientSession() as session:
        made = Server(options, session)
        made.model_dir = folder
        try:
            await made.start(folder, "default", timeout_s=START_S)
            yield made
        finally:
            await made.stop()


def remote(server, session, *, vocab_size=VOCAB_SIZE, context_length=CONTEXT):
    return RemoteEngine(
        server.url,
        session,
        vocab_size=vocab_size,
        context_length=context_length,
        away_timeout_s=10.0,
    )


async def test_a_server_that_somebody_else_started_is_used(server):
    async with aiohttp.ClientSession() as session:
        engine = remote(server, session)
        assert await engine.start() == await server.checksum(timeout_s=30)
        client = EngineClient(
            server.url,
            engine.gate,
            session,
            namespace="n",
            vocab_size=VOCAB_SIZE,
            request_timeout_s=60,
            update_mode=None,
        )
        sampling = SamplingSettings(1.0, ())
        completions = await client.extend([5, 6], num_runs=3, max_new_tokens=9, sampling=sampling)
        await engine.confirm()
    for completion in completions:
        # one may end early
        assert 1 <= len(completion.run) <= 9
        assert completion.run.spans == ((VERSION, len(completion.run), False),)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"vocab_size": 120}, r"vocabulary has 128 tokens, that of model\.path 120"),
        ({"vocab_size": 200}, r"vocabulary has 128 tokens, that of model\.path 200"),
        ({"context_length": CONTEXT + 1}, "context is 256 tokens, .* need up to 257"),
    ],
)
async def test_a_server_of_another_model_or_of_less_context_is_refused(server, options, reason):
    async with aiohttp.ClientSession() as session:
        with pytest.raises(ConfigError, match=reason):
            await remote(server, session, **options).start()


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ({"dtype": "bfloat16"}, "computes in float32, the run in bfloat16"),
        ({"updates_under_load": True}, "started without --enable-priority-scheduling"),
    ],
)
async def test_a_run_refuses_a_server_that_was_started_for_other_work(server, needs, reason):
    async with aiohttp.ClientSession() as session:
        adopted = AdoptedServer(server.url, server.options, replace(NEEDS, **needs), session)
        with pytest.raises(ConfigError, match=reason):
            await adopted.start(server.model_dir, "0.7", timeout_s=30)


async def test_a_run_takes_over_a_server_that_was_left_paused_and_leaves_it_usable(server):
    await server.pause("retract", timeout_s=30)
    checksum = await server.checksum(timeout_s=30)
    async with aiohttp.ClientSession() as session:
        adopted = AdoptedServer(server.url, server.options, NEEDS, session)
        await adopted.start(server.model_dir, "0.7", timeout_s=30)
        assert adopted.is_alive()
        assert await adopted.checksum(timeout_s=30) == checksum
        (before,) = await adopted.score([[5, 6, 7]], timeout_s=30)
        await adopted.pause("retract", timeout_s=30)
        await adopted.stop()
        engine = remote(server, session)
        await engine.start()
        assert (await server.score([[5, 6, 7]], timeout_s=30))[0] == pytest.approx(before, abs=1e-5)
    assert server.is_alive()
