"""Who may work together, and who wants to be alone: many share a time, or one has it for itself.

Waits: `shared` for everybody who wants to be alone, `alone` for those who share and for others who are alone; each ends
the wait by leaving.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Turns:
    """See the module. Whoever wants to be alone goes before those who would share."""

    def __init__(self) -> None:
        self._num_sharing = self._num_alone = 0
        self._changed = asyncio.Condition()
        self._one = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        """Work beside others."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_alone == 0)
        self._num_sharing += 1
        try:
            yield
        finally:
            self._num_sharing -= 1
            await self._tell()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Work while nobody else does."""
        self._num_alone += 1
        try:
            async with self._one:
                async with self._changed:
                    await self._changed.wait_for(lambda: self._num_sharing == 0)
                yield
        finally:
            self._num_alone -= 1
            await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()
