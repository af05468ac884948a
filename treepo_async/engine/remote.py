"""A server that somebody else runs: whether it fits, and whether it stays what it was.

Its weights may not change while it is used. Their name (`weight_version`) and folder are looked at whenever work is
delivered, their checksum at the start and after each time that the server was away. Weights that are replaced under
their old name while it is there are not noticed. Waits: for each answer (`CALL_TIMEOUT_S`), for a server that went away
(`away_timeout_s`; whoever runs it brings it back).
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from treepo_async.engine.fits import Identity, check_room, check_vocabulary, identify
from treepo_async.engine.fixed import Deaths, FixedGate
from treepo_async.errors import ConfigError, EngineError, WeightsError

LOOK_S = 0.2
CALL_TIMEOUT_S = 10.0
CHECKSUM_TIMEOUT_S = 120.0

log = logging.getLogger(__name__)


@dataclass
class RemoteEngine:
    """A `FixedEngine` that is there already."""

    url: str
    session: aiohttp.ClientSession
    vocab_size: int
    """Of the model whose tokenizer is used."""
    context_length: int
    """Tokens that prompt and response need."""
    away_timeout_s: float
    gate: FixedGate = field(init=False)
    deaths: Deaths = field(default_factory=Deaths)
    num_restarts: int = 0
    _identity: Identity | None = None
    _checksum: str = ""

    def __post_init__(self) -> None:
        self.gate = FixedGate(timeout_s=self.away_timeout_s + 2 * CHECKSUM_TIMEOUT_S)

    async def start(self) -> str:
        """See `FixedEngine`.

        Raises:
            ConfigError: nothing answers there, or the server does not fit.
        """
        try:
            self._identity = await identify(self._call)
            check_room(await self._call("GET", "/server_info"), self.context_length)
            await check_vocabulary(self._call, self.vocab_size)
            self._checksum = await self._read_checksum()
        except EngineError as error:
            raise ConfigError(f"engine.url={self.url}: {error}") from error
        self.gate.open()
        return self._checksum

    async def watch(self) -> None:
        """See `FixedEngine`."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self.gate.is_doubted():
                await self._find()
                self.gate.open()

    async def confirm(self) -> None:
        """See `FixedEngine`."""
        found = await identify(self._call)
        if found != self._identity:
            raise WeightsError(
                f"{self.url} has other weights now: {found}, was {self._identity}; a file holds trees of one "
                "model, go on when the server has the old weights again, or with another out"
            )

    def delivered(self) -> None:
        """See `FixedEngine`: nobody counts."""

    def on_trial(self) -> contextlib.AbstractContextManager[None]:
        """See `FixedEngine`: nobody counts."""
        return contextlib.nullcontext()

    async def stop(self) -> None:
        """See `FixedEngine`: it is not ours to stop."""
        self.gate.close()

    async def _find(self) -> None:
        """Return once the server answers, with its old weights."""
        try:
            await self.confirm()
        except EngineError as error:
            cause = error
        else:
            return
        self.gate.close()
        self.deaths.tell()
        log.warning("engine away: %s", cause)
        try:
            async with asyncio.timeout(self.away_timeout_s):
                await self._wait_until_back()
        except TimeoutError as error:
            raise EngineError(
                f"{self.url} stayed away for {self.away_timeout_s:g} s (engine.start_timeout_s): {cause}"
            ) from error
        self.num_restarts += 1

    async def _wait_until_back(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.confirm()
                checksum = await self._read_checksum()
            except EngineError:
                continue
            if checksum != self._checksum:
                raise WeightsError(f"{self.url} came back with other weights ({checksum})")
            return

    async def _read_checksum(self) -> str:
        found = await self._call(
            "POST", "/weights_checker", {"action": "checksum"}, timeout_s=CHECKSUM_TIMEOUT_S
        )
        return str(found["per_engine_checksum"])

    async def _call(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self.session.request(
                method, self.url + path, json=body, timeout=timeout
            ) as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineError(f"{path} was answered by {answer.status}: {text[:300]}")
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EngineError(f"{path} got no answer: {error!r}") from error
