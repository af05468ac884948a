"""`python -m treepo_async.scoring.worker FD SCORER`: a process that scores, one response after the other.

Its parent is `child`, at the other end of the socket FD; it waits for requests without a deadline, and ends when the
parent closes the socket or dies. Standard output belongs to the scorer; the socket is not inherited by what it starts.
"""

import contextlib
import os
import resource
import socket
import sys
from pathlib import Path
from typing import Any

from treepo_async.errors import ConfigError
from treepo_async.scoring.messages import LENGTH, pack, unpack
from treepo_async.scoring.registry import Scorer, attempt, get_scorer

MEMORY_SHARE = 2
"""A worker may allocate one part in so many of the machine's memory; beyond it, it gets a MemoryError."""


def serve(channel: socket.socket, scorer: Scorer) -> None:
    """Answer every request with an accuracy, or with a failure and its detail."""
    own_pid = os.getpid()
    while (request := _receive(channel)) is not None:
        result = attempt(scorer, request["response"], request["answer"])
        if os.getpid() != own_pid:  # a scorer that forked returns twice
            os._exit(0)
        reply = {"number": request["number"]}
        if result.failure is None:
            reply["accuracy"] = result.accuracy
        else:
            reply |= {"failure": result.failure, "detail": result.detail}
        channel.sendall(pack(reply))


def bound() -> None:
    """Be the process that suffers when memory runs out, and leave no core behind."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY_SHARE
    _lower(resource.RLIMIT_DATA, memory_bytes)
    _lower(resource.RLIMIT_CORE, 0)
    # the kernel's choice when memory runs out before that bound; a container may forbid it
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def main(fd: int, name: str) -> None:
    """Import the scorer, say so, and serve."""
    # a group of its own: killed as one with all it started, and spared by the Ctrl-C of a terminal
    os.setpgid(0, 0)
    bound()
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as channel:
        try:
            scorer = get_scorer(name)
        except ConfigError as error:
            channel.sendall(pack({"refused": str(error)[-4000:]}))
            return
        channel.sendall(pack({"ready": True}))
        serve(channel, scorer)


def _receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message of the parent, None when it has closed its end."""
    head = _read(channel, LENGTH.size)
    body = None if head is None else _read(channel, LENGTH.unpack(head)[0])
    return None if body is None else unpack(body)


def _read(channel: socket.socket, length: int) -> bytes | None:
    received = bytearray()
    while len(received) < length:
        part = channel.recv(length - len(received))
        if not part:
            return None
        received += part
    return bytes(received)


def _lower(limit: int, value: int) -> None:
    soft, hard = resource.getrlimit(limit)
    if soft == resource.RLIM_INFINITY or soft > value:
        resource.setrlimit(limit, (value, hard))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
