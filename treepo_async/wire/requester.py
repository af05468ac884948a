"""The asking end of one endpoint: `Requester` for asyncio, `BlockingRequester` for synchronous code.

A request is sent again while no answer comes, and after a refusal that allows it; a peer that was forgotten, since the
other end is a process started anew, greets by itself. Waits: for a connection, an answer, or the end of a refusal
(the router's process ends each; deadline `timeout_s` of the request, after which DeadlineError names the wait).
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import zmq
import zmq.asyncio

from treepo_async.wire import options
from treepo_async.wire.keys import ClientKeys
from treepo_async.wire.messages import Gate, Hello, Message, decode, encode, numbered
from treepo_async.wire.refusals import Answer, Refusals

RESEND_S = 10.0
"""A request without an answer is sent again after this time."""


class Requester:
    """Use as an async context manager."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        owner: str,
        hello: Hello | None = None,
        keys: ClientKeys | None = None,
        on_gate: Callable[[Gate], None] | None = None,
        resend_s: float = RESEND_S,
        max_bytes: int | None = None,
    ) -> None:
        """Connect.

        Args:
            endpoint: where the router is bound.
            name: of this peer; its identity is the name and a fresh incarnation.
            owner: who answers, for the messages of deadlines.
            hello: sent by itself whenever the router does not know this peer.
            keys: of the run; None on loopback without keys.
            on_gate: called with each pushed `Gate`.
            resend_s: a request without an answer is sent again after this time.
            max_bytes: largest attachment that the router takes.

        Raises:
            WireError: the endpoint is not on loopback and there are no keys.
        """
        self.owner = owner
        self._hello, self._max_bytes = hello, max_bytes
        self._resend_s = resend_s
        context = zmq.asyncio.Context.instance()
        self._socket = options.dealer(context, endpoint, name=name, keys=keys)
        self._on_gate = on_gate
        self._numbers = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._receiver: asyncio.Task[None] | None = None
        self._greeting = asyncio.Lock()
        self._num_greetings = 0

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

    async def tell(self, message: Message) -> bool:
        """Send without expecting an answer; False when nobody was connected for `resend_s`."""
        try:
            async with asyncio.timeout(self._resend_s):
                await self._socket.send_multipart([encode(message)])
        except TimeoutError:
            return False
        return True

    async def ask(
        self, message: Message, attachment: Sequence[bytes] = (), *, timeout_s: float, wait: str
    ) -> Answer:
        """Send a request and wait for its answer; sends again every `resend_s`, and after a refusal that allows it.

        Raises:
            DeadlineError: no answer in `timeout_s`; names `wait`, the owner and the last refusal.
            RefusedError: the answer is a `Nack` for good.
            WireError: the attachment is larger than `max_bytes`, or the peer sent what is no message.
        """
        options.check_size(attachment, self._max_bytes)
        refusals = Refusals(self._hello)
        number = next(self._numbers)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    num_greetings = self._num_greetings
                    found = refusals.accept(await self._exchange(message, attachment, number))
                    if found is not None:
                        return found
                    if refusals.greets():
                        await self._greet(num_greetings)
                    await asyncio.sleep(refusals.pause_s())
        except TimeoutError as error:
            raise refusals.deadline_error(wait, self.owner, timeout_s) from error

    async def _greet(self, num_greetings: int) -> None:
        """Greet, unless another request has done so since `num_greetings` were counted."""
        assert self._hello is not None, "a peer without a greeting gives up"
        async with self._greeting:
            if self._num_greetings == num_greetings:
                answer = await self._exchange(self._hello, (), next(self._numbers))
                Refusals(None).accept(answer)
                self._num_greetings += 1

    async def _exchange(self, message: Message, attachment: Sequence[bytes], number: int) -> Answer:
        """The answer to a request, whatever it is."""
        receiver = self._receiver
        assert receiver is not None, "ask inside `async with`"
        frames = [encode(numbered(message, number)), *attachment]
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[number] = future
        try:
            while True:
                await self._socket.send_multipart(frames, copy=not attachment)
                ends: list[asyncio.Future[Any]] = [future, receiver]
                await asyncio.wait(
                    ends,
                    timeout=self._resend_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if future.done():
                    return future.result()
                if receiver.done():
                    receiver.result()
        finally:
            del self._pending[number]

    async def _receive(self) -> None:
        while True:
            frames = options.unwrap(await self._socket.recv_multipart(copy=False))
            message = decode(frames[0], max_bytes=None)
            if isinstance(message, Gate) and message.request == 0:
                if self._on_gate is not None:
                    self._on_gate(message)
                continue
            future = self._pending.get(message.request)
            if future is not None and not future.done():
                future.set_result((message, frames[1:]))


class BlockingRequester:
    """Use from one thread."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        owner: str,
        hello: Hello | None = None,
        keys: ClientKeys | None = None,
        resend_s: float = RESEND_S,
    ) -> None:
        """Connect; see `Requester`."""
        self.owner = owner
        self._hello = hello
        self._resend_s = resend_s
        self._socket = options.dealer(zmq.Context.instance(), endpoint, name=name, keys=keys)
        self._numbers = itertools.count(1)

    def ask(
        self,
        message: Message,
        *,
        timeout_s: float,
        wait: str,
        on_resend: Callable[[], None] = lambda: None,
    ) -> Answer:
        """Send a request and wait for its answer; sends again every `resend_s`, and after a refusal that allows it.

        Args:
            message: the request.
            timeout_s: of the wait.
            wait: what is waited for, as a person would say it.
            on_resend: called before each further attempt.

        Raises:
            DeadlineError: no answer in `timeout_s`; names `wait`, the owner and the last refusal.
            RefusedError: the answer is a `Nack` for good.
        """
        refusals = Refusals(self._hello)
        number = next(self._numbers)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            answer = self._exchange(message, number, deadline)
            if answer is not None:
                found = refusals.accept(answer)
                if found is not None:
                    return found
                if refusals.greets():
                    self._greet(deadline)
                self._pause(refusals.pause_s(), deadline)
            on_resend()
        raise refusals.deadline_error(wait, self.owner, timeout_s)

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def _greet(self, deadline: float) -> None:
        assert self._hello is not None, "a peer without a greeting gives up"
        answer = self._exchange(self._hello, next(self._numbers), deadline)
        if answer is not None:
            Refusals(None).accept(answer)

    def _pause(self, seconds: float, deadline: float) -> None:
        """Wait, but not so long that `on_resend` is missed."""
        time.sleep(max(0.0, min(seconds, self._resend_s, deadline - time.monotonic())))

    def _exchange(self, message: Message, number: int, deadline: float) -> Answer | None:
        """One attempt; None when no answer came for `resend_s`."""
        if not self._send(encode(numbered(message, number)), deadline):
            return None
        return self._receive(number, min(deadline, time.monotonic() + self._resend_s))

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
                frames = options.unwrap(self._socket.recv_multipart(copy=False))
                message = decode(frames[0], max_bytes=None)
                if message.request == number:
                    return message, frames[1:]
        return None
