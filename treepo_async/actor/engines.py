"""The engines that an actor of a run uses: the gate and client of each, and the pool over them where they are several.

Waits: none here; see `gate`, `client` and `pool`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import aiohttp

from treepo_async.actor.expand import Engine
from treepo_async.config.schema import EngineConfig
from treepo_async.config.wiring import EngineAddress, Wiring
from treepo_async.engine.client import EngineClient
from treepo_async.engine.gate import GateClient
from treepo_async.engine.pool import EnginePool, Member
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.wire.keys import client_keys


@dataclass(frozen=True)
class Engines:
    """What an actor has of its engines."""

    trees: Engine
    """On which trees are grown: the pool, or the home where there is no other."""
    home: EngineClient
    """On which is evaluated: its host holds the version."""
    home_gate: GateClient


@asynccontextmanager
async def open_engines(
    wiring: Wiring,
    config: EngineConfig,
    session: aiohttp.ClientSession,
    *,
    vocab_size: int,
    evaluates: bool,
    timeout_s: float,
) -> AsyncIterator[Engines]:
    """Join the hosts of all engines that the wiring names, the home first.

    Args:
        wiring: of the actor.
        config: the section of the run's config.
        session: HTTP connections, with the key of the engines in their headers.
        vocab_size: of the model.
        evaluates: whether the actor evaluates the versions that its home's host marks.
        timeout_s: longest wait for an open gate.
    """
    own = EngineAddress(wiring.engine_url, wiring.gate_endpoint)
    addresses = wiring.engines or (own,)
    keys = client_keys(wiring.keys_dir, wiring.role)
    members, gates = list[Member](), list[GateClient]()
    async with AsyncExitStack() as stack:
        for number, address in enumerate(addresses):
            gate = GateClient(
                address.gate_endpoint,
                name=wiring.role,
                keys=keys,
                evaluates=evaluates and number == 0,
                timeout_s=timeout_s,
                is_one_of_many=len(addresses) > 1,
            )
            client = EngineClient(
                address.url,
                await stack.enter_async_context(gate),
                session,
                namespace=wiring.run_id,
                vocab_size=vocab_size,
                request_timeout_s=config.request_timeout_s,
                update_mode=UpdateMode(config.update_mode),
            )
            members.append(Member(address.url, client, gate))
            gates.append(gate)
        home, home_gate = members[0].client, gates[0]
        if len(members) == 1:
            yield Engines(home, home, home_gate)
            return
        pool = EnginePool(members, timeout_s=timeout_s)
        watching = asyncio.create_task(pool.watch(), name="engine pool")
        try:
            yield Engines(pool, home, home_gate)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
