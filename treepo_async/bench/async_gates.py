"""The engine hosts of a scripted run: the gate of each is real, and what is behind it is time.

    publication -> close gate -> drained -> load_s -> open gate      (drain)
    publication -> close gate -> load_s -> open gate                 (retract, in_place: requests wait in the actors)

Waits: for publications (the learner's), for clients to drain (deadline `DRAIN_S`).
"""

import asyncio
import time
from pathlib import Path

from treepo_async.bench.async_script import Script
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.metrics.events import emit
from treepo_async.types import PolicyVersion

LOOK_S = 0.01
DRAIN_S = 120.0


async def keep_gates(script: Script, publications: Path) -> None:
    """All gates for ever."""
    async with asyncio.TaskGroup() as tasks:
        for engine in range(script.actors):
            keeper = GateKeeper(script.gate_endpoint(engine))
            tasks.create_task(keeper.serve())
            tasks.create_task(_follow(script, engine, keeper, publications))


async def _follow(script: Script, engine: int, keeper: GateKeeper, publications: Path) -> None:
    applied = 0
    await keeper.open(PolicyVersion(0, applied), evaluate=False, hold_s=0.0)
    while True:
        await asyncio.sleep(LOOK_S)
        newest = _newest(publications)
        if newest == applied:
            continue
        begin = time.monotonic()
        await keeper.close()
        if script.update_mode is UpdateMode.DRAIN:
            await keeper.drained(timeout_s=DRAIN_S)
        drained = time.monotonic()
        await asyncio.sleep(script.load_s)
        applied = newest
        await keeper.open(PolicyVersion(0, applied), evaluate=False, hold_s=0.0)
        done = time.monotonic()
        emit(
            "weights",
            at=done,
            engine=engine,
            step=applied,
            drain=drained - begin,
            load=done - drained,
        )


def _newest(publications: Path) -> int:
    return max((int(folder.name) for folder in publications.iterdir()), default=0)
