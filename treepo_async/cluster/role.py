"""One role of the run: a process `python -m treepo_async.<module>` under a light Ray actor.

The Ray actor only starts, watches and ends the process, so each role has its own environment and its own imports,
dies with its Ray worker, and leaves its last lines of output. Its methods run on the worker's main thread, which
lives as long as the worker does: the process's parent-death signal follows that thread.

On a cluster a host is made first with what is known before it is placed; it says where it is (`prepare`), looks around there
(`look`), and is told the wiring (`take`) before it starts its process.
"""

import contextlib
import ipaddress
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from treepo_async import chaos
from treepo_async.cluster.preflight import Question, Sight, look
from treepo_async.config.wiring import Wiring
from treepo_async.errors import ConfigError
from treepo_async.metrics.events import parse
from treepo_async.process import free_ports, start_child, stop_child

VISIBLE = "CUDA_VISIBLE_DEVICES"
MAX_EVENTS = 10_000
TAIL_LINES = 50


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """What to start."""

    name: str
    module: str
    """`treepo_async.<module>` is run."""
    wiring: Wiring
    cpu_threads: int
    max_restarts: int = 0
    """How often it is started again after it was killed, without a new step of the run in between."""
    survives_failure: bool = False
    """Whether it is also started again when it ended by itself, with a reason."""
    cores: frozenset[int] = frozenset()
    """CPU cores it may run on; empty: any."""
    shared_gpus: tuple[int, ...] = ()
    """Numbers of the GPUs that it shares with other roles; empty: it has those that Ray gave to its host."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a host is."""

    address: str
    """Of its node, as other nodes reach it."""
    ports: tuple[int, ...]
    """That are free there, for its role; as a host says it, for all roles of its address."""


@dataclass(frozen=True, slots=True)
class RoleReport:
    """What has happened since the last report."""

    events: list[dict[str, Any]]
    exit_code: int | None
    """None while it runs."""
    tail: str = ""
    """Its last lines of output, once it has ended."""


class RoleHost:
    """Starts and watches one process; made a Ray actor by the driver."""

    def __init__(self, spec: RoleSpec, log_file: Path) -> None:
        self._spec, self._log_file = spec, log_file
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._child: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def prepare(self, address: str, num_ports: int) -> Site:
        """So many ports of this node's address that are free."""
        return Site(address, tuple(free_ports(num_ports, address)))

    def look(self, question: Question) -> Sight:
        """Say what this node has of what the run needs."""
        return look(question)

    def take(self, spec: RoleSpec) -> None:
        """What to start from now on.

        Raises:
            ConfigError: it shall have cores or GPUs that are not here.
        """
        check_cores(spec.module, spec.cores, os.sched_getaffinity(0))
        visible_gpus(spec.shared_gpus, os.environ.get(VISIBLE))
        self._spec = spec

    def start(self) -> int:
        """Start the process, unless it runs: who had no answer asks again. Gives its pid.

        Raises:
            ConfigError: it shall have cores or GPUs that are not here.
        """
        if self._child is not None and self._child.poll() is None:
            return self._child.pid
        # a role that was moved here is not told of by `take`
        check_cores(self._spec.module, self._spec.cores, os.sched_getaffinity(0))
        threads = str(self._spec.cpu_threads)
        self._child = start_child(
            [
                sys.executable,
                "-m",
                f"treepo_async.{self._spec.module}",
                self._spec.wiring.to_json(),
            ],
            env={
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
                "PYTHONUNBUFFERED": "1",
                chaos.ROLE_VARIABLE: self._spec.name,
                **socket_interface(self._spec.wiring.address),
                **visible_gpus(self._spec.shared_gpus, os.environ.get(VISIBLE)),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if self._spec.cores:
            # before it has started a thread or a process of its own, which then inherit it
            os.sched_setaffinity(self._child.pid, self._spec.cores)
        self._reader = threading.Thread(target=self._read, args=(self._child,), daemon=True)
        self._reader.start()
        return self._child.pid

    def report(self) -> RoleReport:
        """Events since the last call, and whether the process has ended."""
        exit_code = None if self._child is None else self._child.poll()
        if exit_code is not None and self._reader is not None:
            self._reader.join(timeout=5)
        events = [self._events.popleft() for _ in range(len(self._events))]
        tail = "" if exit_code is None else "\n".join(self._tail)
        return RoleReport(events, exit_code, tail)

    def ask_to_stop(self) -> None:
        """Have it begin to end; `stop` waits for that."""
        if self._child is not None and self._child.poll() is None:
            self._child.terminate()

    def stop(self, timeout_s: float) -> int | None:
        """End the process, by force at the deadline. Gives its exit code."""
        if self._child is None:
            return None
        stop_child(self._child, timeout_s=timeout_s)
        return self._child.returncode

    def _read(self, child: subprocess.Popen[bytes]) -> None:
        """Sort the process's output: events to the driver, everything else to its log.

        A log that cannot be written, as on a full disk, is told of; reading goes on, or the process would wait for ever.
        """
        assert child.stdout is not None
        is_told = False
        with contextlib.suppress(OSError):
            self._log_file.touch()
        for raw in child.stdout:
            line = raw.decode(errors="replace").rstrip("\n")
            event = parse(line)
            if event is not None:
                self._events.append(event)
                continue
            self._tail.append(line)
            try:
                with self._log_file.open("ab", buffering=0) as log:
                    log.write(line.encode() + b"\n")
            except OSError as error:
                if not is_told:
                    self._events.append(_log_alarm(self._log_file, error))
                is_told = True


def socket_interface(address: str) -> dict[str, str]:
    """Variables that have gloo and NCCL talk over the network interface of an address; none for loopback.

    Without them each takes the interface of the machine's name, which on many clusters is another one.
    """
    if ipaddress.ip_address(address).is_loopback:
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == address for a in addresses):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}


def visible_gpus(gpus: Sequence[int], inherited: str | None) -> dict[str, str]:
    """The variable that names a role's GPUs; none where it has those that Ray gave to its host.

    Args:
        gpus: numbers among those that this process sees.
        inherited: what the variable says here: numbers, UUIDs or names of MIG slices; None: every GPU is seen.

    Raises:
        ConfigError: so many are not seen here.
    """
    if not gpus:
        return {}
    names = [str(gpu) for gpu in gpus]
    if inherited is not None:
        seen = [name.strip() for name in inherited.split(",") if name.strip()]
        if max(gpus) >= len(seen):
            raise ConfigError(
                f"{VISIBLE}={inherited} names {len(seen)} GPUs, and GPU {max(gpus)} is needed; start Ray with the "
                "same value of it, or without"
            )
        names = [seen[gpu] for gpu in gpus]
    return {VISIBLE: ",".join(names)}


def check_cores(role: str, cores: frozenset[int], there: Set[int]) -> None:
    """Refuse cores that this node does not have.

    Args:
        role: its module, whose section of the config has the key.
        cores: that it shall run on; empty: any.
        there: that this process may use.

    Raises:
        ConfigError: naming the key and the cores.
    """
    missing = sorted(cores - there)
    if missing:
        named = ", ".join(map(str, missing[:8])) + (", ..." if missing[8:] else "")
        raise ConfigError(
            f"{role}.cores names {named}, of which node {socket.gethostname()} has none to give; it has {len(there)}, "
            f"{min(there)} to {max(there)}"
        )


def _log_alarm(file: Path, error: OSError) -> dict[str, Any]:
    return {
        "event": "alarm",
        "alarm": "the log of a role cannot be written",
        "detail": f"{file}: {error.strerror or error}",
    }
