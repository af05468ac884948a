"""`python launch/bench.py http [requests=N]`: what a request to the engine costs outside of the engine.

Starts an engine on the tiny model and sends one-token requests for a cached prompt, one at a time and 32 at once.
The cost of a request is its wall time at the client less the time from arrival to answer inside the server:
HTTP, JSON and both event loops.
"""

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from treepo_async.engine.client import Completion, EngineClient, SamplingSettings, all_of
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.process import free_ports
from treepo_async.tiny.cache import prepare
from treepo_async.types import PolicyVersion

CACHE_DIR = Path(".cache/treepo_async")
PROMPT = list(range(3, 67))
VOCAB_SIZE = 384
ROUNDS = 3


async def measure_http(num_requests: int) -> None:
    """Print the table."""
    print(
        f"{'at once':>8} {'requests/s':>11} {'wall p50':>10} {'outside p50':>12} {'outside p99':>12}"
    )
    async with _engine() as engine:
        await _requests(engine, 32, 1)
        for concurrency in (1, 32) * ROUNDS:
            began = time.monotonic()
            completions = await _requests(engine, num_requests, concurrency)
            seconds = time.monotonic() - began
            outside = sorted(c.overhead_s * 1000 for c in completions)
            print(
                f"{concurrency:>8} {num_requests / seconds:>11.0f} "
                f"{1000 * seconds * concurrency / num_requests:>8.1f}ms "
                f"{statistics.median(outside):>10.2f}ms {outside[int(0.99 * len(outside))]:>10.2f}ms"
            )


async def _requests(engine: EngineClient, num_requests: int, concurrency: int) -> list[Completion]:
    async def worker() -> list[Completion]:
        return [
            completion
            for _ in range(num_requests // concurrency)
            for completion in await engine.extend(
                PROMPT, num_runs=1, max_new_tokens=1, sampling=SamplingSettings(1.0, ())
            )
        ]

    return [
        c for completions in await all_of(worker() for _ in range(concurrency)) for c in completions
    ]


@contextlib.asynccontextmanager
async def _engine() -> AsyncIterator[EngineClient]:
    model_dir = await asyncio.to_thread(prepare, CACHE_DIR, 0)
    gate_port, engine_port = free_ports(2)
    endpoint = f"tcp://127.0.0.1:{gate_port}"
    with tempfile.TemporaryDirectory() as folder:
        options = ServerOptions(
            port=engine_port,
            dtype="float32",
            context_length=512,
            max_total_tokens=32768,
            max_running_requests=64,
            prefill_chunk_tokens=4096,
            log_file=Path(folder) / "sglang.log",
        )
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            server, keeper = Server(options, session), GateKeeper(endpoint)
            serving = asyncio.create_task(keeper.serve())
            try:
                await server.start(model_dir, "0.0", timeout_s=300)
                await keeper.open(PolicyVersion(0, 0), evaluate=False, hold_s=0)
                async with GateClient(
                    endpoint, name="bench", evaluates=False, timeout_s=60
                ) as gate:
                    yield EngineClient(
                        server.url,
                        gate,
                        session,
                        namespace="bench",
                        vocab_size=VOCAB_SIZE,
                        request_timeout_s=60,
                    )
            finally:
                serving.cancel()
                keeper.shut()
                await server.stop()


def main(words: list[str]) -> int:
    """Run the benchmark that is named first."""
    options = dict(word.partition("=")[::2] for word in words[1:])
    if words[:1] != ["http"] or not set(options) <= {"requests"}:
        print("usage: python launch/bench.py http [requests=640]", file=sys.stderr)
        return 2
    asyncio.run(measure_http(int(options.get("requests", "640"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
