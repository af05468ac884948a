"""The desk of `weights.desk` over a socket, in a thread of the learner's rank 0: hosts ask it for weights, senders for orders.

Waits: for a peer to ask (`TICK_S`, for ever until `close`). A peer that wants to wait is answered when there is something for it, or
after its `wait_s`.
"""

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from treepo_async.errors import WeightsError, WireError
from treepo_async.types import PolicyVersion
from treepo_async.weights.desk import Desk, Place
from treepo_async.weights.parcel import Parcel
from treepo_async.wire.keys import ServerKeys
from treepo_async.wire.messages import (
    Ack,
    AnyMessage,
    AskSend,
    AskWeights,
    Hello,
    Message,
    Nack,
    NoWeights,
    Refusal,
    TakeWeights,
    WeightsComing,
    WeightsOffer,
    WeightsSent,
    WeightsTaken,
    decode,
    numbered,
    request_of,
)
from treepo_async.wire.sockets import Router

TICK_S = 0.02
MAX_MESSAGE_BYTES = 2**16
STAGE_RETRY_S = 0.1
START_S = 30.0

Answer = tuple[Message, list[bytes]]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A question that has no answer yet."""

    peer: bytes
    message: AskWeights | AskSend
    until: float


class DeskThread:
    """See the module; `offer` and `withdraw_old` may be called from any thread."""

    def __init__(
        self, desk: Desk, endpoint: str, *, run_id: str, keys: ServerKeys | None = None
    ) -> None:
        """Serve.

        Raises:
            WireError: the endpoint cannot be bound.
        """
        self._desk, self._endpoint, self._run_id, self._keys = desk, endpoint, run_id, keys
        self._lock = threading.Lock()
        self._known: set[bytes] = set()
        self._waiting: list[_Waiting] = []
        self._last: dict[bytes, tuple[int, Answer]] = {}
        """The last answer to a host that takes weights: asked once more, it is answered so once more."""
        self._failure: Exception | None = None
        self._is_closed, self._is_up = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="weights desk", daemon=True)
        self._thread.start()
        self._is_up.wait(START_S)
        if self._failure is not None:
            raise WireError(
                f"the weights desk cannot use {endpoint}: {self._failure}"
            ) from self._failure

    def offer(self, parcel: Parcel) -> None:
        """See `Desk.offer`.

        Raises:
            WeightsError: nobody would hear of it, as the thread has ended.
        """
        self._check()
        with self._lock:
            self._desk.offer(parcel)

    def withdraw_old(self) -> list[PolicyVersion]:
        """See `Desk.withdraw_old`.

        Raises:
            WeightsError: as `offer`.
        """
        self._check()
        with self._lock:
            return self._desk.withdraw_old()

    def close(self) -> None:
        """Let go of the endpoint."""
        self._is_closed.set()
        self._thread.join()

    def _check(self) -> None:
        if self._failure is not None:
            raise WeightsError(
                f"the weights desk at {self._endpoint} has ended, no engine can ask for weights: {self._failure!r}"
            ) from self._failure

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # noqa: BLE001  raised again by whoever made this, or uses it
            self._failure = error
        finally:
            self._is_up.set()

    async def _serve(self) -> None:
        router = Router(self._endpoint, max_bytes=MAX_MESSAGE_BYTES, keys=self._keys)
        self._is_up.set()
        try:
            while not self._is_closed.is_set():
                for peer, frames in await router.receive_some(limit=64, timeout_s=TICK_S):
                    for answer, attachment in self._heard(peer, frames[0]):
                        router.send_now(peer, answer, attachment)
                for peer, (answer, attachment) in self._due():
                    router.send_now(peer, answer, attachment)
        finally:
            router.close()

    def _heard(self, peer: bytes, frame: bytes) -> Iterator[Answer]:
        """The answer to a message, if it has one now."""
        number = request_of(frame)
        try:
            message = decode(frame)
        except WireError as error:
            yield Nack(request=number, reason=Refusal.INVALID, detail=str(error)[:500]), []
            return
        with self._lock:
            if isinstance(message, Hello):
                yield self._greeted(peer, message), []
            elif peer not in self._known:
                yield (
                    Nack(
                        request=number,
                        reason=Refusal.HELLO_FIRST,
                        detail="the learner was started anew",
                        retry=True,
                    ),
                    [],
                )
            else:
                yield from self._answers(peer, message)

    def _greeted(self, peer: bytes, hello: Hello) -> Message:
        if hello.run_id != self._run_id:
            detail = f"this is run {self._run_id}, not {hello.run_id}"
            return Nack(request=hello.request, reason=Refusal.WRONG_RUN, detail=detail)
        self._known.add(peer)
        return Ack(request=hello.request)

    def _answers(self, peer: bytes, message: AnyMessage) -> Iterator[Answer]:
        match message:
            case AskWeights() | AskSend():
                self._waiting = [w for w in self._waiting if w.peer != peer]
                self._waiting.append(_Waiting(peer, message, time.monotonic() + message.wait_s))
            case TakeWeights():
                yield self._take(peer, message)
            case WeightsTaken():
                self._desk.taken(message.engine, ok=not message.error)
                yield Ack(request=message.request), []
            case WeightsSent():
                self._desk.sent(message.engine, message.group, ok=not message.error)
                yield Ack(request=message.request), []
            case _:
                detail = f"{type(message).__name__} is nothing to ask of the learner"
                yield Nack(request=message.request, reason=Refusal.INVALID, detail=detail), []

    def _take(self, peer: bytes, message: TakeWeights) -> Answer:
        number, answer = self._last.get(peer, (-1, None))
        if answer is not None and number == message.request:
            return answer
        version = PolicyVersion(message.lineage, message.step)
        try:
            groups = self._desk.take(message.engine, version, server=message.server, tp=message.tp)
        except WeightsError as error:
            nack = Nack(request=message.request, reason=Refusal.STALE, detail=str(error))
            return nack, []
        if groups is None:
            detail = "a stage of the learner has not yet come"
            return (
                Nack(
                    request=message.request,
                    reason=Refusal.STALE,
                    detail=detail,
                    retry=True,
                    retry_after_s=STAGE_RETRY_S,
                ),
                [],
            )
        coming = WeightsComing(request=message.request, groups=groups, clock=time.time())
        self._last[peer] = message.request, (coming, [])
        return coming, []

    def _due(self) -> Iterator[tuple[bytes, Answer]]:
        """Answers to those who wait."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
            for asked in waiting:
                found = self._found(asked.message)
                if found is None and time.monotonic() < asked.until:
                    self._waiting.append(asked)
                    continue
                answer, attachment = found or (NoWeights(), [])
                yield asked.peer, (numbered(answer, asked.message.request), attachment)

    def _found(self, message: AskWeights | AskSend) -> Answer | None:
        if isinstance(message, AskSend):
            self._desk.stage_is_at(message.stage, Place(message.address, message.port))
            order = self._desk.next_order(message.stage, done=message.done)
            return None if order is None else (order, [])
        data = self._desk.next_for(
            PolicyVersion(message.lineage, message.step),
            refused=message.refused,
            evaluates=message.evaluates,
            marked_only=message.marked_only,
        )
        if data is None:
            return None
        version = Parcel.parse(data).version
        return WeightsOffer(lineage=version.lineage, step=version.step), [data]
