"""A server of one's own with fixed weights: started, and started again when it dies.

Waits: for the server to start (`start_timeout_s`). A server that lives but does not answer for `UNANSWERED_S` after a
request was lost is ended and started again too.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from treepo_async.engine.fixed import VERSION, Deaths, FixedGate
from treepo_async.engine.server import Server
from treepo_async.errors import EngineError

LOOK_S = 0.1
UNANSWERED_S = 30.0
CHECKSUM_TIMEOUT_S = 60.0

log = logging.getLogger(__name__)


@dataclass
class KeptEngine:
    """A `FixedEngine` that this process starts."""

    server: Server
    model_dir: Path
    start_timeout_s: float
    max_restarts: int
    """In a row, without work delivered in between; a first restart `on_trial` is not one of them."""
    gate: FixedGate = field(init=False)
    deaths: Deaths = field(default_factory=Deaths)
    num_restarts: int = 0
    _num_in_a_row: int = 0
    _is_on_trial: bool = False
    _checksum: str = ""
    _unanswered_since: float | None = None

    def __post_init__(self) -> None:
        self.url = self.server.url
        # longer than all starts that the keeper may try before it gives up
        self.gate = FixedGate(timeout_s=self.start_timeout_s * (self.max_restarts + 2))

    async def start(self) -> str:
        """See `FixedEngine`; from the main thread, as `Server.start`."""
        await self._start()
        self.gate.open()
        return self._checksum

    async def watch(self) -> None:
        """See `FixedEngine`."""
        while True:
            await asyncio.sleep(LOOK_S)
            if not self.server.is_alive():
                await self._restart("SGLang died\n" + self.server.log_tail())
            elif self.gate.is_doubted():
                await self._look()

    async def confirm(self) -> None:
        """See `FixedEngine`: nobody else can change the weights."""

    def delivered(self) -> None:
        """See `FixedEngine`."""
        self._num_in_a_row = 0

    @contextlib.contextmanager
    def on_trial(self) -> Iterator[None]:
        """See `FixedEngine`."""
        self._is_on_trial = True
        try:
            yield
        finally:
            self._is_on_trial = False

    async def stop(self) -> None:
        """See `FixedEngine`."""
        self.gate.close()
        await self.server.stop()

    async def _look(self) -> None:
        """Open the gate again if the server answers."""
        try:
            await self.server.is_idle()
        except EngineError as error:
            now = time.monotonic()
            self._unanswered_since = self._unanswered_since or now
            if now - self._unanswered_since > UNANSWERED_S:
                await self._restart(f"SGLang has not answered for {UNANSWERED_S:g} s: {error}")
        else:
            self._unanswered_since = None
            self.gate.open()

    async def _restart(self, cause: str) -> None:
        self.gate.close()
        self.deaths.tell()
        if self._is_on_trial:
            # whoever has it for itself tries a bounded number of times; a server that does not start is counted
            self._num_in_a_row -= 1
        while True:
            self._num_in_a_row += 1
            if self._num_in_a_row > self.max_restarts:
                raise EngineError(
                    f"gave up after {self.max_restarts} restarts without a tree (engine.max_restarts): {cause}"
                )
            log.warning("engine restarted: %s", next(iter(cause.splitlines())))
            self.num_restarts += 1
            try:
                await self.server.stop()
                await self._start()
                break
            except EngineError as error:
                cause = str(error)
        self._unanswered_since = None
        self.gate.open()

    async def _start(self) -> None:
        await self.server.start(self.model_dir, str(VERSION), timeout_s=self.start_timeout_s)
        checksum = await self.server.checksum(timeout_s=CHECKSUM_TIMEOUT_S)
        if self._checksum and checksum != self._checksum:
            raise EngineError(f"{self.model_dir} gave other weights than before ({checksum})")
        self._checksum = checksum
