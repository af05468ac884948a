"""Sockets with names, deadlines and no silent loss. No other module touches zmq.

A `Router` serves many peers and answers each by its identity; a `Requester` (asyncio) or `BlockingRequester`
asks it, sends again while no answer comes, and raises DeadlineError in the end. Mandatory routing, immediate
connections, small high-water marks and heartbeats make a lost peer visible instead of swallowing messages.
"""

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio

from treepo_async.errors import DeadlineError, RefusedError, WireError
from treepo_async.wire.messages import AnyMessage, Gate, Message, Nack, decode, encode, numbered

HIGH_WATER_MARK = 64
HEARTBEAT_MS = 2_000
LINGER_MS = 1_000
RESEND_S = 10.0
"""A request without an answer is sent again after this time."""

Answer = tuple[AnyMessage, list[bytes]]


class Router:
    """The serving end of one endpoint (asyncio)."""

    def __init__(self, endpoint: str, *, max_bytes: int) -> None:
        """Bind.

        Args:
            endpoint: e.g. `tcp://127.0.0.1:5555`.
            max_bytes: largest frame that is received.

        Raises:
            WireError: the endpoint is not on loopback.
        """
        _check_loopback(endpoint)
        self._socket = _socket(zmq.asyncio.Context.instance(), zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        self._socket.bind(endpoint)

    async def receive(self) -> tuple[bytes, list[bytes]]:
        """The next peer and its frames, not yet decoded. Waits until a peer sends."""
        peer, *frames = await self._socket.recv_multipart()
        return peer, frames

    async def send(self, peer: bytes, message: Message, attachment: Sequence[bytes] = ()) -> bool:
        """Answer a peer; False when it is gone or does not read (it will ask again)."""
        try:
            await self._socket.send_multipart(
                [peer, encode(message), *attachment], flags=zmq.NOBLOCK
            )
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """Release the endpoint."""
        self._socket.close()


class Requester:
    """The asking end of one endpoint (asyncio)."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        owner: str,
        on_gate: Callable[[Gate], None] | None = None,
        resend_s: float = RESEND_S,
    ) -> None:
        """Connect.

        Args:
            endpoint: where the router is bound.
            name: of this peer; its identity is the name and a fresh incarnation.
            owner: who answers, for the messages of deadlines.
            on_gate: called with each pushed `Gate`.
            resend_s: a request without an answer is sent again after this time.

        Raises:
            WireError: the endpoint is not on loopback.
        """
        self.owner = owner
        self._resend_s = resend_s
        self._socket = _dealer(zmq.asyncio.Context.instance(), endpoint, name)
        self._on_gate = on_gate
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._receiver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._receiver = asyncio.create_task(self._receive(), name=f"receive from {self.owner}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._receiver is not None:
            self._receiver.cancel()
            await asyncio.gather(self._receiver, return_exceptions=True)
        self._socket.close()

    async def tell(self, message: Message) -> None:
        """Send without expecting an answer."""
        await self._socket.send_multipart([encode(message)])

    async def ask(
        self, message: Message, attachment: Sequence[bytes] = (), *, timeout_s: float, wait: str
    ) -> Answer:
        """Send a request and wait for its answer, sending again every `resend_s`.

        Raises:
            DeadlineError: no answer in `timeout_s`; names `wait` and the owner.
            RefusedError: the answer is a `Nack`.
            WireError: the peer sent what is no message.
        """
        receiver = self._receiver
        assert receiver is not None, "ask inside `async with`"
        number = next(self._numbers)
        frames = [encode(numbered(message, number)), *attachment]
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._socket.send_multipart(frames)
                    await asyncio.wait(
                        [future, receiver],
                        timeout=self._resend_s,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                    if future.done():
                        return _accept(future.result())
                    if receiver.done():
                        receiver.result()
        except TimeoutError as error:
            raise DeadlineError(wait, self.owner, timeout_s) from error
        finally:
            del self._pending[number]

    async def _receive(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            message = decode(frames[0])
            if isinstance(message, Gate) and message.request == 0:
                if self._on_gate is not None:
                    self._on_gate(message)
                continue
            future = self._pending.get(message.request)
            if future is not None and not future.done():
                future.set_result((message, frames[1:]))


class BlockingRequester:
    """The asking end for synchronous code."""

    def __init__(self, endpoint: str, *, name: str, owner: str, resend_s: float = RESEND_S) -> None:
        self.owner = owner
        self._resend_s = resend_s
        self._socket = _dealer(zmq.Context.instance(), endpoint, name)
        self._numbers = itertools.count(1)

    def ask(
        self,
        message: Message,
        *,
        timeout_s: float,
        wait: str,
        on_resend: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Send a request and wait for its answer, sending again every `resend_s`.

        Args:
            message: the request.
            timeout_s: of the wait.
            wait: what is waited for, as a person would say it.
            on_resend: called before each further attempt.

        Raises:
            DeadlineError: no answer in `timeout_s`; names `wait` and the owner.
            RefusedError: the answer is a `Nack`.
        """
        number = next(self._numbers)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._send(encode(numbered(message, number)), deadline):
                resend = min(deadline, time.monotonic() + self._resend_s)
                answer = self._receive(number, resend)
                if answer is not None:
                    return _accept(answer)
            on_resend()
        raise DeadlineError(wait, self.owner, timeout_s)

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def _send(self, frame: bytes, deadline: float) -> bool:
        """Whether a peer was connected in time for this attempt."""
        limit_s = min(self._resend_s, deadline - time.monotonic())
        self._socket.setsockopt(zmq.SNDTIMEO, max(1, int(limit_s * 1000)))
        try:
            self._socket.send(frame)
        except zmq.Again:
            return False
        return True

    def _receive(self, number: int, until: float) -> Answer | None:
        while (left := until - time.monotonic()) > 0:
            if self._socket.poll(int(left * 1000) + 1):
                frames = self._socket.recv_multipart()
                message = decode(frames[0])
                if message.request == number:
                    return message, frames[1:]
        return None


def _accept(answer: Answer) -> Answer:
    message = answer[0]
    if isinstance(message, Nack):
        raise RefusedError(message.reason, message.detail, retry=message.retry)
    return answer


def _check_loopback(endpoint: str) -> None:
    if not endpoint.startswith("tcp://127.0.0.1:"):
        raise WireError(
            f"endpoint {endpoint} is not on loopback; connections to other machines need keys, not built yet"
        )


def _socket(context: Any, kind: int) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    return socket


def _dealer(context: Any, endpoint: str, name: str) -> Any:
    _check_loopback(endpoint)
    socket = _socket(context, zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, f"{name}:{uuid.uuid4().hex[:12]}".encode())
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.connect(endpoint)
    return socket
