"""What a request to the engine costs outside of the engine: `bench.py http`.

One-token requests for a cached prompt on the tiny model, one at a time and 32 at once. The cost of a request is its
wall time at the client less the time from arrival to answer inside the server: HTTP, JSON and both event loops.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from treepo_async.bench.engine import EngineSize, started
from treepo_async.engine.answer import Completion
from treepo_async.engine.client import EngineClient, SamplingSettings, all_of
from treepo_async.errors import ConfigError
from treepo_async.tiny.cache import prepare

PROMPT = list(range(3, 67))
ROUNDS = 3
NUM_REQUESTS = 640
CONCURRENCIES = (1, 32)


def parse(words: Sequence[str]) -> int:
    """Read `requests=N`, the requests of one measurement.

    Raises:
        ConfigError: any other word, or fewer requests than are sent at once.
    """
    num_requests = NUM_REQUESTS
    for word in words:
        key, _, value = word.partition("=")
        if key != "requests":
            raise ConfigError(f"{word}: unknown key {key}; the only one is requests")
        if not (value.isascii() and value.isdigit() and int(value) >= max(CONCURRENCIES)):
            raise ConfigError(
                f"{word} is not a whole number from {max(CONCURRENCIES)}, e.g. requests={NUM_REQUESTS}"
            )
        num_requests = int(value)
    return num_requests


async def measure(num_requests: int, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Say the table, a line at a time."""
    say(
        f"{'at once':>8} {'requests/s':>11} {'wall p50':>10} {'outside p50':>12} {'outside p99':>12}"
    )
    model_dir = await asyncio.to_thread(prepare, cache_dir, 0)
    size = EngineSize(context_tokens=512, cache_tokens=32768, running_requests=64)
    async with started(model_dir, size) as engine:
        client = engine.client()
        await _requests(client, 32, 1)
        for concurrency in CONCURRENCIES * ROUNDS:
            began = time.monotonic()
            completions = await _requests(client, num_requests, concurrency)
            say(_line(completions, concurrency, time.monotonic() - began))


def _line(completions: Sequence[Completion], concurrency: int, seconds: float) -> str:
    num_requests = len(completions)
    outside = sorted(completion.overhead_s * 1000 for completion in completions)
    return (
        f"{concurrency:>8} {num_requests / seconds:>11.0f} "
        f"{1000 * seconds * concurrency / num_requests:>8.1f}ms "
        f"{statistics.median(outside):>10.2f}ms {outside[int(0.99 * num_requests)]:>10.2f}ms"
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
