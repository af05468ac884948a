"""The client's side of the gate: no request is submitted while weights are being changed.

A client joins its engine host and is told whether the gate is open and under which policy version. When the gate
closes it submits nothing more and says `Drained` once its last request is back; the host then changes weights and
opens the gate again. A client whose server was gone doubts its gate: the host may have died with the server, and the
next one may not be there yet. Waits: for the gate to open, and after a doubt for the host's word that it is (the host, or
the one that takes its place, ends both; deadline `timeout_s`).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Any, NamedTuple, Protocol

from treepo_async.errors import ClosedError, DeadlineError, WireError
from treepo_async.metrics.slots import at_gate, in_flight
from treepo_async.types import PolicyVersion
from treepo_async.wire.keys import ClientKeys
from treepo_async.wire.messages import Drained, Evaluated, Gate, Join, Message
from treepo_async.wire.sockets import Requester

BEAT_S = 1.0
RESEND_S = 2.0
"""A `Join` that died with its host is sent to the next one after this time."""


class GateStatus(NamedTuple):
    """How a gate stands, for whoever may go through another one."""

    is_open: bool
    is_down: bool
    """Its server is being started again, or somebody's request was lost and its host has not said since that it is there."""
    version: PolicyVersion
    silent_s: float
    """Since the host was last heard of."""
    num_in_flight: int | None
    """Requests in the server, of all clients; None where nobody counts."""
    epoch: int
    """Another one after each change."""

    def __str__(self) -> str:
        """E.g. `closed at 0.3, its server is down, not heard of for 7 s`."""
        words = [f"{'open' if self.is_open else 'closed'} at {self.version}"]
        words += ["its server is down"] * self.is_down
        words += [f"not heard of for {self.silent_s:.0f} s"] * (self.silent_s > 2 * BEAT_S)
        return ", ".join(words)


class EngineGate(Protocol):
    """What requests to an engine ask of its gate; `fixed.FixedGate` is one without a host."""

    def passage(
        self, least_step: int = 0, *, patience_s: float | None = None
    ) -> AbstractAsyncContextManager[PolicyVersion]:
        """Hold a request in flight under the current version; see `GateClient.passage`."""

    def status(self) -> GateStatus:
        """How it stands."""

    async def stands_by(self, version: PolicyVersion, *, patience_s: float | None = None) -> bool:
        """Whether the version is proven; see `GateClient.stands_by`."""

    def doubt(self) -> None:
        """Let no request pass until the server is known to be there."""


class GateClient:
    """What one client knows of its host's gate. Use as an async context manager."""

    def __init__(
        self,
        endpoint: str,
        *,
        name: str,
        evaluates: bool,
        timeout_s: float,
        keys: ClientKeys | None = None,
        is_one_of_many: bool = False,
    ) -> None:
        """Prepare.

        Args:
            endpoint: of the host's gate.
            name: of this client.
            evaluates: whether it will evaluate the versions marked for it.
            timeout_s: longest wait for an open gate.
            keys: of the run; None on loopback without keys.
            is_one_of_many: whether the client can do without this host, and so goes on asking for it without end.
        """
        self.to_evaluate: asyncio.Queue[PolicyVersion] = asyncio.Queue()
        self._host = Requester(
            endpoint,
            name=name,
            owner="engine host",
            keys=keys,
            on_gate=self._see,
            resend_s=RESEND_S,
        )
        self._join = Join(name=name, evaluates=evaluates)
        self._timeout_s, self._is_one_of_many = timeout_s, is_one_of_many
        self._heard_at = time.monotonic()
        self._gate = Gate(epoch=-1, is_open=False)
        self._num_in_flight = 0
        self._changed = asyncio.Event()
        self._doubted = asyncio.Event()
        self._handed_over: set[PolicyVersion] = set()
        """Versions that went into `to_evaluate`."""
        self._evaluated: set[PolicyVersion] = set()
        self._beats: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> "GateClient":
        await self._host.__aenter__()
        self._beats = asyncio.create_task(self._beat(), name="gate beat")
        self._beats.add_done_callback(lambda _: self._changed.set())
        self._tasks = [self._beats]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._host.__aexit__(None, None, None)

    @contextlib.asynccontextmanager
    async def passage(
        self, least_step: int = 0, *, patience_s: float | None = None
    ) -> AsyncIterator[PolicyVersion]:
        """Hold a request in flight under the current version, once the gate is open for it.

        Args:
            least_step: oldest policy step that will do.
            patience_s: of a request that another engine may take; it does not wait for a server that is down either.

        Raises:
            ClosedError: the gate did not open in time.
        """
        if not self._admits(least_step):
            with at_gate():
                await self._wait_open(least_step, patience_s)
        version = self._version()
        self._num_in_flight += 1
        try:
            with in_flight():
                yield version
        finally:
            self._num_in_flight -= 1
            self._report_if_drained()

    async def stands_by(self, version: PolicyVersion, *, patience_s: float | None = None) -> bool:
        """Whether the host has opened the gate under a version or a later one: it does so once they are proven.

        Args:
            version: that an answer names.
            patience_s: as of `passage`.

        Raises:
            ClosedError: the gate did not open in time.
        """
        await self._wait_open(0, patience_s)
        return self._version() >= version

    def doubt(self) -> None:
        """Let no request pass until the host says anew how its gate stands: the server did not answer one."""
        self._doubted.set()
        self._changed.set()

    def status(self) -> GateStatus:
        """See `EngineGate`."""
        gate, is_doubted = self._gate, self._doubted.is_set()
        return GateStatus(
            gate.is_open and not is_doubted,
            gate.is_down or is_doubted,
            self._version(),
            time.monotonic() - self._heard_at,
            gate.num_in_flight,
            gate.epoch,
        )

    async def evaluated(self, version: PolicyVersion) -> None:
        """Tell the host that the evaluation of a version is done."""
        self._evaluated.add(version)
        await self._host.tell(Evaluated(step=version.step))

    async def _wait_open(self, least_step: int, patience_s: float | None = None) -> None:
        limit_s = self._timeout_s if patience_s is None else patience_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                while not self._admits(least_step):
                    if patience_s is not None and self.status().is_down:
                        limit.reschedule(time.monotonic())
                    if self._beats is not None and self._beats.done():
                        # without beats this client counts for nothing: whoever waits here must hear why
                        self._beats.result()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            wait = f"the gate to open at policy step {least_step} or later (it is at {self._version()})"
            raise ClosedError(wait, "engine host", limit_s) from error

    def _admits(self, least_step: int) -> bool:
        is_open = self._gate.is_open and not self._doubted.is_set()
        return is_open and self._gate.step >= least_step

    def _version(self) -> PolicyVersion:
        return PolicyVersion(self._gate.lineage, self._gate.step)

    def _see(self, gate: Gate) -> None:
        self._heard_at = time.monotonic()
        if gate.host != self._gate.host or gate.epoch >= self._gate.epoch:
            self._gate = gate
            self._changed.set()
            self._see_evaluation()
        # also for a gate that is known: an earlier report may have been lost
        self._report_if_drained()

    def _see_evaluation(self) -> None:
        """Pass on a version to be evaluated, once; say again that it is done to a host that has not heard of it."""
        version = self._version()
        if not (self._gate.is_open and self._gate.evaluate and self._join.evaluates):
            return
        if version in self._evaluated:
            self._tell(Evaluated(step=version.step))
        elif version not in self._handed_over:
            self._handed_over.add(version)
            self.to_evaluate.put_nowait(version)

    def _report_if_drained(self) -> None:
        if not self._gate.is_open and self._num_in_flight == 0 and self._gate.epoch >= 0:
            self._tell(Drained(epoch=self._gate.epoch))

    def _tell(self, message: Message) -> None:
        task = asyncio.ensure_future(self._host.tell(message))
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _beat(self) -> None:
        """Join again every second, or at a doubt: the host forgets the silent, and a lost push is made up for."""
        while True:
            doubted = self._doubted.is_set()
            try:
                answer, _ = await self._host.ask(
                    self._join, timeout_s=self._timeout_s, wait="an answer to Join"
                )
            except DeadlineError:
                if self._is_one_of_many:
                    continue
                raise
            if not isinstance(answer, Gate):
                raise WireError(f"Join was answered by {type(answer).__name__}, expected Gate")
            self._see(answer)
            if doubted:
                # asked after the doubt, so the answer knows of its cause
                self._doubted.clear()
                self._changed.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._doubted.wait()
