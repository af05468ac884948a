"""A network between a peer and replay that a test can break: a TCP proxy, switched while connections are open.

    peer <-> Proxy.endpoint ... two lanes a connection ... <-> target

A lane carries bytes one way, later by `delay_s`, at most `bytes_per_s` of them, and not at all while it is `blocked`. What a
blocked lane was given arrives after it is opened, as after a partition, when TCP sends again; an end that is closed meanwhile
is not heard of either. While `answers` is off a connection is accepted and leads nowhere, like a host that is half dead.

Waits: a lane for bytes, for its turn, and for being opened (the test ends that wait). `close()` ends all.
"""

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Self

from treepo_async.process import free_ports

CHUNK_BYTES = 2**16
GREETING_BYTES = 64
"""With which a connection of ZMTP 3 begins."""
MAX_ON_THE_WAY = 256
"""Chunks in one lane: beyond it the sender is held back, as by a full window."""


@dataclass
class Lane:
    """One direction of all connections."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0
    """0: as fast as can be."""
    num_bytes: int = 0
    """That arrived."""
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def block(self) -> None:
        """Nothing arrives from here on."""
        self._open.clear()

    def unblock(self) -> None:
        """What was held back arrives, and what follows."""
        self._open.set()

    async def pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        """Deliver, in pieces where the lane is slow."""
        piece = max(1, int(self.bytes_per_s / 20)) if self.bytes_per_s else len(data)
        for start in range(0, len(data), piece):
            await self._open.wait()
            part = data[start : start + piece]
            writer.write(part)
            await writer.drain()
            self.num_bytes += len(part)
            if self.bytes_per_s:
                await asyncio.sleep(len(part) / self.bytes_per_s)

    async def opened(self) -> None:
        """Until it is not blocked."""
        await self._open.wait()


class Proxy:
    """See the module; one for each pair of peers and target that is to be cut apart."""

    def __init__(self, target: str, *, seed: int = 0) -> None:
        """Name the target, e.g. `tcp://127.0.0.1:5555`; `seed` decides the jitter."""
        self._target = _port_of(target)
        self.endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        self.to_target, self.to_peer = Lane(), Lane()
        self.answers = True
        self.captures: list[bytearray] = []
        """What the peer of each connection has sent, oldest first."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(
            self._carry, "127.0.0.1", _port_of(self.endpoint), limit=CHUNK_BYTES
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.heal()
        self.reset()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def partition(self) -> None:
        """Cut both lanes."""
        self.to_target.block()
        self.to_peer.block()

    def heal(self) -> None:
        """Open both lanes, without delay."""
        for lane in (self.to_target, self.to_peer):
            lane.delay_s = lane.jitter_s = lane.bytes_per_s = 0.0
            lane.unblock()
        self.answers = True

    def reset(self) -> int:
        """Break every connection with RST. Gives how many sockets that were."""
        broken = list(self._writers)
        for writer in broken:
            sock = writer.get_extra_info("socket")
            with contextlib.suppress(OSError):
                sock.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        return len(broken)

    @contextlib.asynccontextmanager
    async def played_again(self, capture: bytes) -> AsyncIterator[bytearray]:
        """Send what was captured on a fresh connection to the target. Gives what comes back, as it comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._target)
        answer = bytearray()

        async def listen() -> None:
            while data := await reader.read(CHUNK_BYTES):
                answer.extend(data)

        listener = asyncio.create_task(listen())
        try:
            for part in (capture[:GREETING_BYTES], capture[GREETING_BYTES:]):
                writer.write(part)
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                # zmq does not go on where the rest comes along with the greeting
                await asyncio.sleep(0.05)
            yield answer
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            writer.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        task = asyncio.current_task()
        assert task is not None, "a connection is a task"
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if not self.answers:
                # it never leads anywhere, also not when later ones do
                while await reader.read(CHUNK_BYTES):
                    pass
                return
            capture = bytearray()
            self.captures.append(capture)
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(far_writer)
            try:
                await self._both(reader, writer, far_reader, far_writer, capture)
            finally:
                self._writers.discard(far_writer)
                far_writer.close()
        except (ConnectionError, OSError):
            # an end is gone, or nobody listens at the target
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
        capture: bytearray,
    ) -> None:
        """Carry until an end has closed and the other has been told."""
        lanes = [
            asyncio.create_task(self._one(reader, far_writer, self.to_target, capture)),
            asyncio.create_task(self._one(far_reader, writer, self.to_peer, None)),
        ]
        try:
            await asyncio.wait(lanes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)

    async def _one(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        lane: Lane,
        capture: bytearray | None,
    ) -> None:
        chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_ON_THE_WAY)
        feeder = asyncio.create_task(self._feed(reader, chunks, lane, capture))
        clock = asyncio.get_running_loop().time
        try:
            while True:
                due, data = await chunks.get()
                await asyncio.sleep(max(0.0, due - clock()))
                if not data:
                    await lane.opened()
                    return
                await lane.pass_on(data, writer)
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)

    async def _feed(
        self,
        reader: asyncio.StreamReader,
        chunks: "asyncio.Queue[tuple[float, bytes]]",
        lane: Lane,
        capture: bytearray | None,
    ) -> None:
        """Take what is sent, and say when it is to arrive; nothing overtakes what went before."""
        clock, last = asyncio.get_running_loop().time, 0.0
        while True:
            try:
                data = await reader.read(CHUNK_BYTES)
            except ConnectionError:
                data = b""
            if capture is not None:
                capture.extend(data)
            last = max(last, clock() + lane.delay_s + lane.jitter_s * self._random.random())
            await chunks.put((last, data))
            if not data:
                return


def _port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
