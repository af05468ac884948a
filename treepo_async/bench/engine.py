"""An engine of one's own for a benchmark: an SGLang server, its gate, and clients that note every answer.

Waits: for the server to start (`START_S`; the server, or its death, ends it) and for each answer (`REQUEST_S`).
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from typing_extensions import override

from treepo_async.engine.answer import Completion
from treepo_async.engine.client import EngineClient
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.process import descendants, free_ports
from treepo_async.types import PolicyVersion

VOCAB_SIZE = 384
"""Of the tiny tokenizer's models."""
START_S = 300.0
REQUEST_S = 600.0
FLUSH_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineSize:
    """How much an engine takes at once."""

    context_tokens: int
    cache_tokens: int | None
    """None: as many as the engine finds room for."""
    running_requests: int


@dataclass(frozen=True, slots=True)
class EngineModel:
    """What an engine must know of its model beside the folder."""

    dtype: str = "float32"
    vocab_size: int = VOCAB_SIZE
    load_format: str = "auto"


class NotingClient(EngineClient):
    """An engine client that keeps every completion, also those of requests that only fill the prefix cache."""

    completions: list[Completion]

    @override
    async def attempt(self, *args: Any, **kwargs: Any) -> Completion:
        completion = await super().attempt(*args, **kwargs)
        self.completions.append(completion)
        return completion


class BenchEngine:
    """A running engine; every client of it has a cache namespace of its own."""

    def __init__(
        self,
        server: Server,
        gate: GateClient,
        session: aiohttp.ClientSession,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        self._server, self._gate, self._session = server, gate, session
        self._vocab_size = vocab_size
        self._num_clients = 0

    @property
    def url(self) -> str:
        """Of the server."""
        return self._server.url

    def client(self) -> NotingClient:
        """A client for which nothing is cached yet."""
        self._num_clients += 1
        client = NotingClient(
            self._server.url,
            self._gate,
            self._session,
            namespace=f"bench-{self._num_clients}",
            vocab_size=self._vocab_size,
            request_timeout_s=REQUEST_S,
        )
        client.completions = []
        return client

    async def flush(self) -> None:
        """Empty the prefix cache, so that what comes next evicts nothing of what came before."""
        await self._server.flush_cache(timeout_s=FLUSH_S)


def children_processor_s() -> float:
    """Processor time so far of all processes below this one: the server, here."""
    total = 0.0
    for process in descendants(os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


@contextlib.asynccontextmanager
async def started(
    model_dir: Path, size: EngineSize, model: EngineModel = EngineModel()
) -> AsyncIterator[BenchEngine]:
    """An engine on the tiny model, a random one, or none but its config. Enter it in the main thread.

    Raises:
        EngineError: the server did not start.
    """
    gate_port, engine_port = free_ports(2)
    endpoint = f"tcp://127.0.0.1:{gate_port}"
    with tempfile.TemporaryDirectory() as folder:
        options = ServerOptions(
            port=engine_port,
            dtype=model.dtype,
            context_length=size.context_tokens,
            max_total_tokens=size.cache_tokens,
            max_running_requests=size.running_requests,
            prefill_chunk_tokens=4096,
            log_file=Path(folder) / "sglang.log",
            load_format=model.load_format,
        )
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            server, keeper = Server(options, session), GateKeeper(endpoint)
            serving = asyncio.create_task(keeper.serve())
            try:
                await server.start(model_dir, "0.0", timeout_s=START_S)
                await keeper.open(PolicyVersion(0, 0), evaluate=False, hold_s=0)
                async with GateClient(
                    endpoint, name="bench", evaluates=False, timeout_s=60
                ) as gate:
                    yield BenchEngine(server, gate, session, model.vocab_size)
            finally:
                serving.cancel()
                keeper.shut()
                await server.stop()
