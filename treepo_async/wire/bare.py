"""Both ends of a connection without the protocol behind it, to measure what that costs: `bench.queue` uses them.

`Line` sends prepared frames and hands out what comes back as it is: no resending, no asyncio. `answer_all` is a router that
looks at nothing. Waits: `Line.send` for room in the connection, `Line.receive` for an answer (the router's process ends
both; deadline `PATIENCE_S`), `answer_all` for messages, for ever.
"""

import select
from collections.abc import Sequence

import zmq

from treepo_async.errors import DeadlineError
from treepo_async.wire import options
from treepo_async.wire.messages import Ack, encode

PATIENCE_S = 60.0


class Line:
    """The asking end. Use from one thread."""

    def __init__(self, endpoint: str, *, name: str) -> None:
        """Connect."""
        self._socket = options.dealer(zmq.Context.instance(), endpoint, name=name, keys=None)
        self._socket.setsockopt(zmq.SNDTIMEO, int(1000 * PATIENCE_S))
        self._socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        self._fd: int = self._socket.getsockopt(zmq.FD)

    def is_open(self, timeout_s: float) -> bool:
        """Whether there is a connection to send by, within this time."""
        return bool(self._socket.poll(int(1000 * timeout_s), zmq.POLLOUT))

    def send(self, frames: Sequence[bytes]) -> None:
        """Send a message, large frames as views.

        Raises:
            DeadlineError: the connection took nothing for `PATIENCE_S`.
        """
        try:
            self._socket.send_multipart(frames, copy=False)
        except zmq.Again as error:
            raise DeadlineError("sending", "replay", PATIENCE_S) from error

    def receive(self) -> list[bytes]:
        """The next message.

        Raises:
            DeadlineError: there was none for `PATIENCE_S`.
        """
        try:
            frames: list[bytes] = self._socket.recv_multipart()
        except zmq.Again as error:
            raise DeadlineError("an answer", "replay", PATIENCE_S) from error
        return frames

    def receive_until(self, time_left_s: float) -> list[bytes] | None:
        """The next message; None if there is none by then."""
        frames = options.take(self._socket)
        if frames is None and time_left_s > 0:
            select.select([self._fd], [], [], time_left_s)
            frames = options.take(self._socket)
        return frames

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()


def answer_all(endpoint: str, *, max_bytes: int) -> None:
    """Answer every message with an `Ack`, for ever."""
    socket = options.router(zmq.Context.instance(), endpoint, max_bytes=max_bytes, keys=None)
    ack = encode(Ack(note="accepted"))
    while True:
        peer, *_ = options.unwrap(socket.recv_multipart(copy=False))
        socket.send_multipart([peer, ack])
