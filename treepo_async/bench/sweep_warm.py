"""A sweep with one SGLang server for all of its cells: started before the first, stopped after the last.

Every run finds the server as it would find one that somebody else runs (`engine.url`): it loads its initial weights, and proves
them. Waits: for the server to start (`bench.engine`), for the sweep.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from treepo_async.bench.engine import EngineSize, started
from treepo_async.bench.sweep import Sweep, run
from treepo_async.tiny.cache import prepare

SIZE = EngineSize(context_tokens=512, cache_tokens=32768, running_requests=64)
"""As the defaults of a run."""


async def run_warm(
    sweep: Sweep,
    cache_dir: Path,
    launch: Callable[[Sequence[str], Path, float], int],
    say: Callable[[str], None],
) -> None:
    """`sweep.run` with a server. Call it in the main thread.

    Raises:
        EngineError: the server did not start.
        ConfigError, TreepoError: from `sweep.run`.
    """
    model_dir = await asyncio.to_thread(prepare, cache_dir, 0)
    async with started(model_dir, SIZE) as engine:
        say(f"one SGLang server for all cells: {engine.url}")
        warm = replace(sweep, warm=(*sweep.warm, f"engine.url={engine.url}"))
        await asyncio.to_thread(run, warm, launch, say)
