"""An engine whose weights never change, for work without a learner: its gate, and what is asked of who looks after it.

Nothing here speaks ZeroMQ: gate, client and keeper live in one process. `kept` starts a server and keeps it alive,
`remote` uses one that somebody else runs. Waits: `passage` for an open gate (the keeper opens it, or ends the process
with its reason; deadline `timeout_s`), `death` for the server's next death (whoever waits does other work meanwhile).
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Protocol

from treepo_async.engine.gate import GateStatus
from treepo_async.errors import ClosedError
from treepo_async.types import PolicyVersion

VERSION = PolicyVersion(0, 0)
"""Of all that is sampled."""


class FixedGate:
    """An `EngineGate` that a keeper in the same process opens and closes; it begins closed."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._open = asyncio.Event()
        self._is_doubted = False

    @contextlib.asynccontextmanager
    async def passage(
        self, least_step: int = 0, *, patience_s: float | None = None
    ) -> AsyncIterator[PolicyVersion]:
        """See `EngineGate`; there is one version, so any step will do. A gate that is closed has no server behind it."""
        limit_s = self._timeout_s if patience_s is None else 0.0
        try:
            async with asyncio.timeout(limit_s):
                await self._open.wait()
        except TimeoutError as error:
            wait = "the server to be there again"
            raise ClosedError(wait, "the keeper of the engine", limit_s) from error
        yield VERSION

    def status(self) -> GateStatus:
        """See `EngineGate`."""
        is_open = self._open.is_set()
        return GateStatus(is_open, not is_open, VERSION, 0.0, None, 0)

    async def stands_by(self, version: PolicyVersion, *, patience_s: float | None = None) -> bool:
        """See `EngineGate`."""
        return version == VERSION

    def doubt(self) -> None:
        """See `EngineGate`; the keeper finds out."""
        self._is_doubted = True
        self._open.clear()

    def is_doubted(self) -> bool:
        """Whether somebody's request was lost since the gate was opened."""
        return self._is_doubted

    def open(self) -> None:
        """Let requests in: the server is there."""
        self._is_doubted = False
        self._open.set()

    def close(self) -> None:
        """Let no request in."""
        self._open.clear()


class FixedEngine(Protocol):
    """A server with fixed weights and who looks after it."""

    deaths: "Deaths"

    @property
    def url(self) -> str:
        """Of the server."""

    @property
    def gate(self) -> FixedGate:
        """Before it."""

    @property
    def num_restarts(self) -> int:
        """How often it was there again."""

    async def start(self) -> str:
        """Open the gate once the server is there. Gives what tells its weights from others.

        Raises:
            EngineError: there is no such server, or it does not fit.
        """

    async def watch(self) -> None:
        """Look after the server for ever.

        Raises:
            EngineError: it is gone for good.
            WeightsError: it has other weights.
        """

    async def confirm(self) -> None:
        """Return if all that was sampled until now is of the same weights.

        Raises:
            EngineError: that cannot be known now.
            WeightsError: it is not.
        """

    def delivered(self) -> None:
        """Work that needed the server came to its end: it is no use counting earlier deaths."""

    def on_trial(self) -> AbstractContextManager[None]:
        """While a piece of work has the server for itself: deaths are of its doing, and not counted either."""

    async def stop(self) -> None:
        """Leave nothing behind."""


class Deaths:
    """Tells everybody who waits that the server is gone, and what it held with it."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def tell(self) -> None:
        """It died."""
        died, self._next = self._next, asyncio.Event()
        died.set()

    async def wait(self) -> None:
        """Until it dies the next time."""
        await self._next.wait()
