"""One scoring process as its parent sees it: started when it is needed, killed when it does not answer.

Waits: for the import of the scorer (`START_TIMEOUT_S`), for each score (the caller's deadline), for the end of a
process whose socket closed (`ENDING_S`), for the end of a killed one (`REAP_S`) and of its output (`ENDING_S`).
Whatever ends a wait for a score without an answer also ends the process, so that no answer is ever taken for another's.
"""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from treepo_async.errors import ConfigError, WireError
from treepo_async.process import descendants, start_child
from treepo_async.scoring.failures import Attempt, Failure, failed
from treepo_async.scoring.messages import LENGTH, MAX_REPLY_BYTES, pack, unpack

START_TIMEOUT_S = 120.0
"""A user's module may load a model."""
ENDING_S = 1.0
REAP_S = 5.0
MAX_OUTPUT_BYTES = 20_000
"""What a process prints is logged up to here."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Running:
    """A process that was started."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    output: asyncio.Task[None]


class Child:
    """A process with a scorer in it, and after its death the next one.

    Args:
        name: of the scorer.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._running: _Running | None = None
        self._number = 0
        self._burials: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start a process, unless there is one that lives, and wait until it can score.

        Raises:
            ConfigError: it refused the scorer, ended over its import, or did not come to an end with it.
        """
        if self._running is not None and self._running.reader.at_eof():
            # it died while it had nothing to do
            self.kill()
        if self._running is not None:
            return
        self._running = await _run(self._name)
        try:
            await _ready(self._running, self._name)
        except BaseException:
            self.kill()
            raise

    async def attempt(self, response: str, answer: str, timeout_s: float) -> Attempt:
        """Score one response; a process that gives no answer is killed.

        Raises:
            ConfigError: a new process was needed and did not start.
        """
        await self.start()
        assert self._running is not None
        is_answered = False
        try:
            async with asyncio.timeout(timeout_s):
                result = await self._ask(self._running, response, answer)
            is_answered = True
        except TimeoutError:
            return failed(Failure.TIMED_OUT, f"no score within {timeout_s:g} s")
        except (asyncio.IncompleteReadError, ConnectionError):
            return failed(Failure.DIED, await _ending(self._running.process))
        except WireError as error:
            return failed(Failure.DIED, str(error))
        finally:
            if not is_answered:
                self.kill()
        return result

    def kill(self) -> None:
        """Kill the process and what it started; nothing is waited for, see `close`."""
        running, self._running = self._running, None
        if running is None:
            return
        pid = running.process.pid
        family = descendants(pid)
        # its whole group, as a fork bomb is faster than any list; a process without its group yet has no family either
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        running.process.kill()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        running.writer.close()
        burial = asyncio.ensure_future(_bury(running))
        self._burials.add(burial)
        burial.add_done_callback(self._burials.discard)

    async def close(self) -> None:
        """Kill the process, and wait until it is gone."""
        self.kill()
        await asyncio.gather(*self._burials)

    async def _ask(self, running: _Running, response: str, answer: str) -> Attempt:
        self._number += 1
        request = {"number": self._number, "response": response, "answer": answer}
        running.writer.write(pack(request))
        await running.writer.drain()
        return _result(await _receive(running.reader), self._number)


async def _run(name: str) -> _Running:
    ours, theirs = socket.socketpair()
    with theirs:
        process = _spawn(theirs, name)
    try:
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        printed = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(printed), process.stdout
        )
    except BaseException:
        process.kill()
        ours.close()
        raise
    return _Running(process, reader, writer, asyncio.ensure_future(_forward(printed, transport)))


def _spawn(channel: socket.socket, name: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    return start_child(
        [sys.executable, "-m", "treepo_async.scoring.worker", str(channel.fileno()), name],
        env={"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(channel.fileno(),),
    )


async def _ready(running: _Running, name: str) -> None:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            first = await _receive(running.reader)
    except TimeoutError as error:
        raise ConfigError(
            f"scorer {name!r} was not imported within {START_TIMEOUT_S:g} s"
        ) from error
    except (asyncio.IncompleteReadError, ConnectionError, WireError) as error:
        ending = await _ending(running.process)
        raise ConfigError(
            f"scorer {name!r} cannot be imported: {ending}; what it printed is in the log"
        ) from error
    if "refused" in first:
        raise ConfigError(str(first["refused"]))


async def _receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message of a worker.

    Raises:
        WireError: it is no such message.
        asyncio.IncompleteReadError: the worker has closed its end.
    """
    (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
    if length > MAX_REPLY_BYTES:
        raise WireError(f"a scoring worker sent {length} bytes, at most {MAX_REPLY_BYTES} are read")
    return unpack(await reader.readexactly(length))


def _result(reply: dict[str, Any], number: int) -> Attempt:
    """The attempt in a reply.

    Raises:
        WireError: it answers something else, or nothing.
    """
    accuracy, detail = reply.get("accuracy"), reply.get("detail")
    if reply.get("number") != number:
        raise WireError(f"a scoring worker answered {reply.get('number')!r} instead of {number}")
    if isinstance(accuracy, float) and math.isfinite(accuracy):
        return Attempt(accuracy)
    if reply.get("failure") in list(Failure) and isinstance(detail, str):
        return failed(Failure(reply["failure"]), detail)
    raise WireError(f"a scoring worker answered {reply!r:.200}")


async def _ending(process: subprocess.Popen[bytes]) -> str:
    """How the process ended; it is not reaped, so that its pid stays its own."""
    deadline = asyncio.get_running_loop().time() + ENDING_S
    how = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while asyncio.get_running_loop().time() < deadline:
        ended = os.waitid(os.P_PID, process.pid, how)  # noqa: ASYNC222 - WNOHANG: it does not block
        if ended is not None:
            cause = "exit code" if ended.si_code == os.CLD_EXITED else "signal"
            return f"its process ended with {cause} {ended.si_status}"
        await asyncio.sleep(0.01)
    return "its process closed the connection"


async def _forward(printed: asyncio.StreamReader, transport: asyncio.BaseTransport) -> None:
    """Log what the process prints, by whole lines; it is read to the end, or its prints would block."""
    left, rest = MAX_OUTPUT_BYTES, b""
    try:
        while chunk := await printed.read(2**16):
            rest += chunk
            end = len(rest) if len(rest) > 2**16 else rest.rfind(b"\n") + 1
            left = _show(rest[:end], left)
            rest = rest[end:]
        _show(rest, left)
    finally:
        transport.close()


def _show(lines: bytes, left: int) -> int:
    """Log lines up to the bytes that are left. Gives what is left then."""
    if lines and left > 0:
        _log.warning("a scorer printed: %s", lines[:left].decode(errors="replace").rstrip("\n"))
        if len(lines) >= left:
            _log.warning("what else this scoring process prints is not shown")
    return left - len(lines)


async def _bury(running: _Running) -> None:
    """Reap a killed process, and end its output, which what it started may hold open."""
    process = running.process
    try:
        await asyncio.to_thread(process.wait, REAP_S)
    except subprocess.TimeoutExpired:
        _log.warning("scoring process %d was killed and does not end", process.pid)
    await asyncio.wait([running.output], timeout=ENDING_S)
    running.output.cancel()
