"""The actor's loop: lease -> expand -> score -> put, for several prompts at once.

Waits: for a lease (replay answers every few seconds, with the reason when there is none), for a tree (see `grow`), for
the ack of a tree (replay; sent again until it comes). An actor owns nothing that is lost when it dies: its leases
expire and go to another.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import (
    LEASE_WAIT_S,
    ReplayClient,
    is_lost,
    prompt_of,
)
from treepo_async.engine.client import all_of
from treepo_async.errors import DeadlineError, EngineError, RefusedError
from treepo_async.types import Tree
from treepo_async.wire.messages import Leased

BEAT_S = 2.0
BACK_OFF_S = 1.0

log = logging.getLogger(__name__)


@dataclass
class Worker:
    """Grows trees until replay has no more prompts."""

    replay: ReplayClient
    grower: Grower
    _leases: set[str] = field(default_factory=set)

    async def serve(self, concurrent_trees: int) -> None:
        """`run` for ever: a replay that dies has the trees that it lost grown again, also after the last prompt."""
        while True:
            await self.run(concurrent_trees)
            await asyncio.sleep(LEASE_WAIT_S)

    async def run(self, concurrent_trees: int) -> None:
        """Keep that many prompts growing until the leases end."""
        async with asyncio.TaskGroup() as group:
            beats = group.create_task(self._beat(), name="beats")
            await all_of(self._work() for _ in range(concurrent_trees))
            beats.cancel()

    async def _work(self) -> None:
        while (lease := await self.replay.lease()) is not None:
            self._leases.add(lease.lease_id)
            try:
                tree = await self._grow(lease)
                await self.replay.put(lease, tree)
            except (EngineError, DeadlineError) as error:
                log.warning("gave up lease %s: %s", lease.lease_id, error)
                await self.replay.give_up(lease, type(error).__name__)
                # an engine or a scorer in trouble must not use up prompt after prompt
                await asyncio.sleep(BACK_OFF_S)
            except RefusedError as error:
                if not is_lost(error):
                    raise
                log.warning("tree of lease %s was refused: %s", lease.lease_id, error)
            finally:
                self._leases.discard(lease.lease_id)

    async def _grow(self, lease: Leased) -> Tree:
        return await self.grower.grow(
            prompt_of(lease),
            lease_id=lease.lease_id,
            attempt=lease.attempt,
            least_step=lease.least_step,
        )

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self.replay.beat(self._leases)
