"""User scorers for tests: what they do stands in the response. Imported by real scoring processes."""
# ruff: noqa: T201 - scorers print

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from treepo_async.scoring.failures import BadKeyError

WAIT_S = 30.0


def obey(response, answer):
    """Carry out `order` or `order:argument`; an order that is nothing special is right."""
    order, _, argument = response.partition(":")
    return ORDERS.get(order, lambda _: 1.0)(argument)


def equal(response, answer):
    """Whether the response is the answer."""
    return float(response == answer)


def _raise(_):
    raise LookupError("no such answer")


def _bad_key(_):
    raise BadKeyError("the key is no answer")


def _loop(_):
    while True:
        pass


def _allocate(_):
    blocks = []
    while True:
        blocks.append(np.zeros(2**27))  # never written to, so that the machine loses nothing


def _print(_):
    print("a whole line")
    print("no end of line", end="")
    os.write(2, b" from below")
    return 1.0


def _flood(megabytes):
    for _ in range(int(megabytes)):
        print("x" * 2**20)
    return 1.0


def _fork(_):
    os.fork()
    return 1.0


def _fork_bomb(file):
    """Start processes that replace themselves faster than they can be listed, and touch the file; they end by themselves."""
    Path(file).touch()
    end = time.monotonic() + WAIT_S
    for _ in range(20):
        if os.fork() == 0:
            while time.monotonic() < end:
                if os.fork():
                    os._exit(0)
                os.utime(file)
            os._exit(0)
    time.sleep(WAIT_S)


def _send(reply):
    """Answer behind the worker's back."""
    body = reply.encode()
    os.write(_socket(), struct.pack("!I", len(body)) + body)
    return 1.0


def _claim_length(length):
    os.write(_socket(), struct.pack("!I", int(length)) + b"x")
    time.sleep(WAIT_S)


def _socket():
    """The worker's connection to its parent."""
    links = Path("/proc/self/fd").iterdir()
    return next(int(link.name) for link in links if link.is_socket())


def _write_pid(file):
    Path(file).write_text(str(os.getpid()))
    return 1.0


def _leave_child(file):
    """Start a process in a session of its own, and hang."""
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    Path(file).write_text(str(child.pid))
    time.sleep(WAIT_S)


def _leave_orphan(file):
    """Start a process whose own parent ends, and hang."""
    subprocess.run(
        ["sh", "-c", f"sleep 60 & echo $! > {file}"], check=True, stdout=subprocess.DEVNULL
    )
    time.sleep(WAIT_S)


def _exit_beside_child(_):
    """End while a process goes on that inherited all there is."""
    subprocess.Popen(["sleep", "60"], close_fds=False)
    os._exit(3)


def _meet(file):
    """Be there, and wait for the other one: right only if both are scored at the same time."""
    own, other = file.split("|")
    Path(own).touch()
    deadline = time.monotonic() + WAIT_S
    while not Path(other).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return float(Path(other).exists())


ORDERS = {
    "raise": _raise,
    "bad key": _bad_key,
    "sys.exit": lambda _: sys.exit(0),
    "os._exit": lambda _: os._exit(3),
    "segfault": lambda _: ctypes.string_at(0),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "close": lambda _: os.closerange(3, 64),
    "loop": _loop,
    "allocate": _allocate,
    "nan": lambda _: float("nan"),
    "inf": lambda _: float("inf"),
    "text": lambda _: "1.0",
    "none": lambda _: None,
    "array": lambda _: np.ones(3),
    "huge": lambda _: 10**400,
    "scalar": lambda _: np.float32(0.5),
    "bool": lambda _: True,
    "outside": lambda _: -3,
    "print": _print,
    "flood": _flood,
    "fork": _fork,
    "fork bomb": _fork_bomb,
    "send": _send,
    "claim": _claim_length,
    "pid": _write_pid,
    "leave child": _leave_child,
    "leave orphan": _leave_orphan,
    "exit beside child": _exit_beside_child,
    "meet": _meet,
    "oom_score_adj": lambda _: float(Path("/proc/self/oom_score_adj").read_text()),
    "stdin": lambda _: float(sys.stdin.read() == ""),
}
