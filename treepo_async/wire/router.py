"""The serving end of one endpoint: many peers, each answered by its identity.

Waits: `receive_some` and `receive` for a peer to send (peers end the wait; deadline given by the caller, `receive` has
none). Sending never waits: an answer that a peer does not take is counted and left to the peer, which asks again.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import zmq

from treepo_async.wire import options
from treepo_async.wire.guard import Guard
from treepo_async.wire.keys import ServerKeys
from treepo_async.wire.messages import Message, encode

GONE, FULL = "gone", "full"
"""Why an answer was not sent: no such peer, or it does not read."""
LONG_S = 3600.0


class Router:
    """Use from one asyncio loop."""

    def __init__(self, endpoint: str, *, max_bytes: int, keys: ServerKeys | None = None) -> None:
        """Bind.

        Args:
            endpoint: e.g. `tcp://127.0.0.1:5555`.
            max_bytes: largest frame that is received; a peer that sends a larger one is cut.
            keys: of the run; only peers on its allow-list are let in. None: everybody, on loopback.

        Raises:
            WireError: the endpoint is not on loopback and there are no keys.
        """
        self.unsent: Counter[str] = Counter()
        """Answers that were not sent, by `GONE` or `FULL`."""
        options.check_endpoint(endpoint, keys)
        # a guard answers for all sockets of its context, so that one with keys has a context of its own
        self._guard = None if keys is None else Guard(keys)
        context = zmq.Context.instance() if self._guard is None else self._guard.context
        try:
            self._socket = options.router(context, endpoint, max_bytes=max_bytes, keys=keys)
        except BaseException:
            self._stop_guard()
            raise
        if self._guard is not None:
            self._guard.watch(self._socket)
        self._fd: int = self._socket.getsockopt(zmq.FD)
        self._signal_due: asyncio.Future[None] | None = None
        """Of the task that waits for the socket."""

    async def receive_some(
        self, *, limit: int, timeout_s: float
    ) -> list[tuple[bytes, list[bytes]]]:
        """What is there, as (peer, frames), not yet decoded; at most `limit`, empty at the deadline.

        Waits while nothing is there, and lets other tasks run in any case.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        await asyncio.sleep(0)
        while True:
            taken = self._take(limit)
            if taken or (left_s := deadline - loop.time()) <= 0:
                return taken
            await self._signal(loop, left_s)

    async def receive(self) -> tuple[bytes, list[bytes]]:
        """The next peer and its frames, not yet decoded. Waits until a peer sends."""
        while True:
            for found in await self.receive_some(limit=1, timeout_s=LONG_S):
                return found

    def send_now(self, peer: bytes, message: Message, attachment: Sequence[bytes] = ()) -> bool:
        """Answer a peer; False when it is gone or does not read (it will ask again)."""
        try:
            self._socket.send_multipart(
                [peer, encode(message), *attachment], flags=zmq.NOBLOCK, copy=not attachment
            )
        except zmq.Again:
            self.unsent[FULL] += 1
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.unsent[GONE] += 1
        else:
            return True
        finally:
            # sending takes zmq's signal from whoever waits for it: what arrived must be looked for again
            if self._signal_due is not None:
                _wake(self._signal_due)
        return False

    async def send(self, peer: bytes, message: Message, attachment: Sequence[bytes] = ()) -> bool:
        """As `send_now`."""
        return self.send_now(peer, message, attachment)

    def close(self) -> None:
        """Release the endpoint."""
        self._socket.close()
        self._stop_guard()

    def _stop_guard(self) -> None:
        if self._guard is not None:
            self._guard.stop()

    def _take(self, limit: int) -> list[tuple[bytes, list[bytes]]]:
        taken: list[tuple[bytes, list[bytes]]] = []
        while len(taken) < limit:
            frames = options.take(self._socket)
            if frames is None:
                break
            taken.append((frames[0], frames[1:]))
        return taken

    async def _signal(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> None:
        """Return when the socket may have something, or at the deadline.

        zmq's descriptor is readable from the moment something happens until the socket is used, which `_take` did
        just before: a signal in between is not missed. Another task that sends meanwhile uses it too, and ends the wait.
        """
        signal = self._signal_due = loop.create_future()
        loop.add_reader(self._fd, _wake, signal)
        timer = loop.call_later(timeout_s, _wake, signal)
        try:
            await signal
        finally:
            timer.cancel()
            self._signal_due = None
            loop.remove_reader(self._fd)


def _wake(signal: "asyncio.Future[Any]") -> None:
    if not signal.done():
        signal.set_result(None)
