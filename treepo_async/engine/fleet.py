"""Several servers that somebody else runs, used as one: all must have the same weights.

Waits: as `remote`. One that stays away for long ends nothing as long as another one is there: the work goes on without it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from treepo_async.engine.fixed import Deaths, FixedGate
from treepo_async.engine.remote import RemoteEngine
from treepo_async.errors import ConfigError, EngineError

log = logging.getLogger(__name__)


@dataclass
class RemoteFleet:
    """A `FixedEngine` of several; its `deaths` are those of the last one that was there."""

    members: Sequence[RemoteEngine]
    deaths: Deaths = field(default_factory=Deaths)

    @property
    def url(self) -> str:
        """Of the first one."""
        return self.members[0].url

    @property
    def gate(self) -> FixedGate:
        """Of the first one."""
        return self.members[0].gate

    @property
    def num_restarts(self) -> int:
        """Of all."""
        return sum(member.num_restarts for member in self.members)

    async def start(self) -> str:
        """See `FixedEngine`.

        Raises:
            ConfigError: nothing answers at an address, a server does not fit, or two have different weights.
        """
        found = await asyncio.gather(*(member.start() for member in self.members))
        for member, weights in zip(self.members, found, strict=True):
            if weights != found[0]:
                raise ConfigError(
                    f"engine.url: {member.url} has other weights than {self.url}; a file holds trees of one model, "
                    "name servers of one model alone"
                )
        return found[0]

    async def watch(self) -> None:
        """See `FixedEngine`."""
        async with asyncio.TaskGroup() as tasks:
            for member in self.members:
                tasks.create_task(self._tend(member), name=f"watch {member.url}")
                tasks.create_task(self._tell_death(member), name=f"deaths of {member.url}")

    async def confirm(self) -> None:
        """See `FixedEngine`; a server that is away is asked when it is back."""
        for member in self.members:
            if member.gate.status().is_open:
                await member.confirm()

    def delivered(self) -> None:
        """See `FixedEngine`: nobody counts."""

    def on_trial(self) -> contextlib.AbstractContextManager[None]:
        """See `FixedEngine`: nobody counts."""
        return contextlib.nullcontext()

    async def stop(self) -> None:
        """See `FixedEngine`."""
        for member in self.members:
            await member.stop()

    def _is_any_there(self) -> bool:
        return any(member.gate.status().is_open for member in self.members)

    async def _tend(self, member: RemoteEngine) -> None:
        while True:
            try:
                await member.watch()
            except EngineError as error:
                if not self._is_any_there():
                    raise
                log.warning("%s; going on without it", error)

    async def _tell_death(self, member: RemoteEngine) -> None:
        while True:
            await member.deaths.wait()
            if not self._is_any_there():
                self.deaths.tell()
