"""The host's side of the gate: who the clients are, when all have drained, and when a version is evaluated.

Waits: for every live client to drain after `close` (the clients end the wait; deadline given by the caller, and
a client that has been silent for `silent_s` no longer counts).
"""

import asyncio
import logging
import time
import uuid
from dataclasses import dataclass

from treepo_async.errors import WireError
from treepo_async.types import PolicyVersion
from treepo_async.wire.keys import ServerKeys
from treepo_async.wire.messages import (
    AnyMessage,
    Drained,
    Evaluated,
    Gate,
    Join,
    Nack,
    decode,
    numbered,
    request_of,
    with_load,
    without_evaluation,
)
from treepo_async.wire.sockets import Router

SILENT_S = 5.0
MAX_MESSAGE_BYTES = 2**16

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Client:
    name: str
    evaluates: bool
    last_seen: float
    drained_epoch: int = -1


class GateKeeper:
    """Opens and closes the gate; `serve()` must run beside it."""

    def __init__(
        self, endpoint: str, *, silent_s: float = SILENT_S, keys: ServerKeys | None = None
    ) -> None:
        self._silent_s = silent_s
        self._router = Router(endpoint, max_bytes=MAX_MESSAGE_BYTES, keys=keys)
        self._gate = Gate(epoch=0, is_open=False, host=uuid.uuid4().hex)
        self._clients: dict[bytes, _Client] = {}
        self._changed = asyncio.Event()
        self._hold_until = 0.0
        self._num_in_flight = 0

    async def serve(self) -> None:
        """Answer clients for ever."""
        while True:
            peer, frames = await self._router.receive()
            try:
                message = decode(frames[0])
            except WireError as error:
                log.warning("refused a message: %s", error)
                nack = Nack(
                    request=request_of(frames[0]), reason="invalid", detail=str(error)[:500]
                )
                self._router.send_now(peer, nack)
                continue
            await self._handle(peer, message)

    async def open(self, version: PolicyVersion, *, evaluate: bool, hold_s: float) -> None:
        """Let requests in under a version; one to be evaluated is held for at most `hold_s`.

        A version that is opened again, after a restart of its server, stays held as long as it was.
        """
        if evaluate:
            self._hold_until = time.monotonic() + hold_s
        elif version != PolicyVersion(self._gate.lineage, self._gate.step):
            self._hold_until = 0.0
        await self._announce(is_open=True, version=version, evaluate=evaluate)

    async def close(self, *, is_down: bool = False) -> None:
        """Let no request in; `is_down` while the server is started again."""
        version = PolicyVersion(self._gate.lineage, self._gate.step)
        await self._announce(is_open=False, version=version, evaluate=False, is_down=is_down)

    def tell_load(self, num_in_flight: int) -> None:
        """Tell clients from now on that the server has so many requests."""
        self._num_in_flight = num_in_flight

    async def drained(self, *, timeout_s: float) -> bool:
        """Whether every live client drained in time."""
        try:
            async with asyncio.timeout(timeout_s):
                while any(c.drained_epoch < self._gate.epoch for c in self._live()):
                    self._changed.clear()
                    waiter = asyncio.create_task(self._changed.wait())
                    await asyncio.wait([waiter], timeout=self._silent_s)
                    waiter.cancel()
        except TimeoutError:
            return False
        return True

    def is_held(self) -> bool:
        """Whether the current version must stay because it is being evaluated."""
        return time.monotonic() < self._hold_until

    def shut(self) -> None:
        """Release the endpoint."""
        self._router.close()

    def _live(self) -> list[_Client]:
        now = time.monotonic()
        return [c for c in self._clients.values() if now - c.last_seen < self._silent_s]

    async def _announce(
        self, *, is_open: bool, version: PolicyVersion, evaluate: bool, is_down: bool = False
    ) -> None:
        self._gate = Gate(
            epoch=self._gate.epoch + 1,
            is_open=is_open,
            host=self._gate.host,
            lineage=version.lineage,
            step=version.step,
            evaluate=evaluate,
            is_down=is_down,
            num_in_flight=self._num_in_flight,
        )
        for peer in list(self._clients):
            if not await self._router.send(peer, self._gate):
                del self._clients[peer]

    async def _handle(self, peer: bytes, message: AnyMessage) -> None:
        client = self._clients.get(peer)
        if isinstance(message, Join):
            if client is None:
                client = self._clients[peer] = _Client(message.name, message.evaluates, 0.0)
            client.last_seen = time.monotonic()
            gate = with_load(self._gate, self._num_in_flight)
            await self._router.send(peer, numbered(gate, message.request))
        elif isinstance(message, Drained) and client is not None:
            client.drained_epoch = max(client.drained_epoch, message.epoch)
            self._changed.set()
        elif isinstance(message, Evaluated) and message.step == self._gate.step:
            self._hold_until = 0.0
            # a client that joins from now on must not evaluate what is no longer held
            self._gate = without_evaluation(self._gate)
