"""A server that somebody else runs, as the engine of a training run: a `Server` whose process is not ours.

To start is to find it, to check that it fits, and to load weights into it; to stop is to leave it as it may be used by the
next one: not paused. It is dead once nothing has listened at its address for `REFUSED_S`, or nothing has answered for `GONE_S`: what
answers there after that may be another process, with other weights. Whoever runs it brings it back; it is then given the weights that it had. Who adopts a server has it for itself: what runs in it at a start
is ended.

Waits: for the server to be there (`timeout_s` of `start`), for each answer.
"""

import asyncio
import contextlib
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from typing_extensions import override

from treepo_async.engine.fits import check_room, check_updates, check_vocabulary, identify
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.errors import ConfigError, EngineError

LOOK_S = 0.5
CALL_TIMEOUT_S = 10.0
LEAVE_S = 3.0
REFUSED_S = 2.0
"""Longer than a server that works is out of connections, shorter than one takes to start."""
GONE_S = 10.0
"""Longer than any pause between two answers of a server that works."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs of a server."""

    vocab_size: int
    context_length: int
    dtype: str
    updates_under_load: bool


class AdoptedServer(Server):
    """See the module."""

    def __init__(
        self, url: str, options: ServerOptions, needs: Needs, session: aiohttp.ClientSession
    ) -> None:
        """Prepare.

        Args:
            url: of the server.
            options: of a server that one would start; those that it was started with are its own.
            needs: what it must be.
            session: HTTP connections, with its key in their headers.
        """
        super().__init__(options, session)
        self.url, self._needs = url, needs
        self._is_there = False
        self._answered_at = 0.0
        self._refused_at = math.inf
        """When it first refused a connection since it last answered."""

    @override
    async def start(self, model_dir: Path, weight_version: str, *, timeout_s: float) -> float:
        """Find it and load the weights in `model_dir`. Gives the seconds it took.

        Raises:
            ConfigError: it does not fit.
            EngineError: it was not there in time, or did not take the weights.
        """
        begin = time.monotonic()
        deadline = begin + timeout_s
        self.incarnation = uuid.uuid4().hex
        self.groups.clear()
        while not await self._answers():
            await self._wait(deadline, timeout_s)
        # whoever had it before may have left it paused, where it generates nothing, and at work
        await self.resume(timeout_s=CALL_TIMEOUT_S)
        while not await self._is_ready():
            await self._wait(deadline, timeout_s)
        await self._check_fit()
        await self.post("/abort_request", {"rid": "", "abort_all": True}, timeout_s=CALL_TIMEOUT_S)
        await self.flush_cache(timeout_s=CALL_TIMEOUT_S)
        await self.load_weights(model_dir, weight_version, timeout_s=timeout_s)
        self._is_there, self._answered_at, self._refused_at = True, time.monotonic(), math.inf
        return time.monotonic() - begin

    @override
    def is_alive(self) -> bool:
        """Whether it has answered lately."""
        return self._is_there

    @override
    async def stop(self) -> None:
        """Leave it running, and not paused."""
        self._is_there = False
        with contextlib.suppress(EngineError):
            await self.resume(timeout_s=LEAVE_S)

    @override
    def log_tail(self, lines: int = 30) -> str:
        """Where its log is."""
        return f"the log of {self.url} is with whoever runs it (engine.url)"

    @override
    async def loads(self) -> list[dict[str, Any]]:
        """See `Server`; also how it is found out that it is gone."""
        try:
            loads = await super().loads()
        except EngineError as error:
            self._not_answered(error)
            raise
        self._answered_at, self._refused_at = time.monotonic(), math.inf
        return loads

    def _not_answered(self, error: EngineError) -> None:
        now = time.monotonic()
        is_refused = isinstance(error.__cause__, aiohttp.ClientConnectorError)
        if is_refused:
            self._refused_at = min(self._refused_at, now)
        is_gone = is_refused and now - self._refused_at > REFUSED_S
        if is_gone or now - self._answered_at > GONE_S:
            self._is_there = False

    async def _answers(self) -> bool:
        """Whether something is there, ready or not."""
        try:
            await self._call("GET", "/model_info", None)
        except EngineError:
            return False
        return True

    async def _wait(self, deadline: float, timeout_s: float) -> None:
        if time.monotonic() > deadline:
            raise EngineError(
                f"no server was ready at engine.url={self.url} for {timeout_s:g} s (engine.start_timeout_s)"
            )
        await asyncio.sleep(LOOK_S)

    async def _check_fit(self) -> None:
        try:
            await identify(self._call)
            info: Mapping[str, Any] = await self._call("GET", "/server_info", None)
            check_room(info, self._needs.context_length)
            check_updates(
                info,
                dtype=self._needs.dtype,
                updates_under_load=self._needs.updates_under_load,
            )
            await check_vocabulary(self._call, self._needs.vocab_size)
        except EngineError as error:
            raise ConfigError(f"engine.url={self.url}: {error}") from error

    async def _call(self, method: str, path: str, body: Any) -> Any:
        if method == "POST":
            return await self.post(path, body, timeout_s=CALL_TIMEOUT_S)
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        try:
            async with self._session.get(self.url + path, timeout=timeout) as answer:
                if answer.status != 200:
                    raise EngineError(f"{path} was answered by {answer.status}")
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise EngineError(f"{path} got no answer: {error!r}") from error
