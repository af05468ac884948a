"""Child processes that cannot outlive their parent, and a record of those that once did."""

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from treepo_async.errors import ConfigError

LOOPBACK = "127.0.0.1"
FIRST_PORT = 10_000
"""Well-known services listen below."""

_EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_BYTES = 2**30, 2**25
"""What glibc keeps at the end of a heap; the largest block that it takes from a heap (it allows no more)."""
_libc = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the thread that started it ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def keep_freed_memory() -> None:
    """Have this process use freed memory again, up to 1 GiB, where glibc would return large blocks to the kernel.

    The first touch of a page costs more than what is done with it: a process through which blocks of half a megabyte
    pass spends most of its time there. Without glibc nothing happens.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def start_child(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdout: IO[bytes] | int,
    stderr: IO[bytes] | int,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a child that dies with the calling thread: call it from a thread that lives on.

    Args:
        command: program and arguments.
        env: added to this process's environment.
        stdout: a file, or a constant of `subprocess`.
        stderr: likewise.
        pass_fds: open files that the child keeps, under the same numbers.
    """
    return subprocess.Popen(
        list(command),
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        preexec_fn=die_with_parent,
    )


def stop_child(child: subprocess.Popen[bytes], *, timeout_s: float) -> None:
    """SIGTERM, then SIGKILL at the deadline, to the child and to whatever it started."""
    family = [*descendants(child.pid), psutil.Process(child.pid)] if child.poll() is None else []
    if family:
        child.terminate()
    try:
        child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        family += descendants(child.pid)
        child.kill()
        child.wait()
    kill_all([(p.pid, p.create_time()) for p in family if p.is_running()])


def run_child(command: Sequence[str], *, log_file: Path, timeout_s: float, stop_s: float) -> int:
    """Run a child to its end. Gives its exit code, -1 if it did not end in time; nothing of it is left.

    Args:
        command: program and arguments.
        log_file: takes all its output, in the place of what was there.
        timeout_s: longest time it may take.
        stop_s: between SIGTERM and SIGKILL, where it took longer or the wait was interrupted.
    """
    with log_file.open("wb") as log:
        child = start_child(command, env={}, stdout=log, stderr=log)
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return -1
    finally:
        stop_child(child, timeout_s=stop_s)


def descendants(pid: int) -> list[psutil.Process]:
    """Children, grandchildren and so on of a process."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: Sequence[tuple[int, float]]) -> int:
    """SIGKILL each process that still is the one meant.

    Args:
        processes: (pid, create time) pairs; a pid that was given to another process is left alone.

    Returns:
        How many were killed.
    """
    num_killed = 0
    for pid, create_time in processes:
        try:
            process = psutil.Process(pid)
            if abs(process.create_time() - create_time) < 1:
                process.kill()
                num_killed += 1
        except psutil.NoSuchProcess:
            continue
    return num_killed


def record_family(file: Path, pid: int, *, without: int | None = None) -> None:
    """Write the pids and create times of a process's descendants, for `kill_recorded`.

    Args:
        file: where to.
        pid: whose descendants.
        without: a descendant that is left out.
    """
    rows = []
    for process in descendants(pid):
        try:
            if process.pid != without:
                rows.append((process.pid, process.create_time()))
        except psutil.NoSuchProcess:
            continue
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(rows))
    temporary.replace(file)


def kill_recorded(file: Path) -> int:
    """Kill what `record_family` wrote and still runs, and remove the record; 0 when there is none."""
    try:
        rows = json.loads(file.read_text())
    except FileNotFoundError:
        return 0
    num_killed = kill_all([(pid, create_time) for pid, create_time in rows])
    file.unlink(missing_ok=True)
    return num_killed


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Different ports of an address and of loopback that were free a moment ago, none of which the kernel hands out by itself.

    A port of the kernel's own range may become the end of any connection, or the listener of a library that asks for
    just any port, before the process that it was chosen for has bound it.

    Args:
        count: how many.
        host: an address of this machine.

    Raises:
        ConfigError: it is none.
        OSError: there are not as many.
    """
    _check_address(host)
    low, high = (int(word) for word in _EPHEMERAL_PORTS.read_text().split())
    candidates = [port for port in range(FIRST_PORT, 2**16) if not low <= port <= high]
    found: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        if len(found) == count:
            break
        if all(_is_free(address, port) for address in {host, LOOPBACK}):
            found.append(port)
    if len(found) < count:
        raise OSError(f"{len(found)} ports from {FIRST_PORT} on are free, {count} are needed")
    return found


def _check_address(host: str) -> None:
    if not _is_free(host, 0):
        raise ConfigError(
            f"{host} is no address of this machine (cluster.host; of a Ray node: ray start --node-ip-address)"
        )


def _is_free(host: str, port: int) -> bool:
    """Whether a port can be bound; 0: any."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind((host, port))
        return True
    return False
