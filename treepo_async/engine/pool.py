"""Several engines that an actor uses as one: each request goes where its prefix is, unless it must go elsewhere (`routing`).

Every engine has its own gate, so its own policy version, and its own client. An engine is out while its server is down,
its host is silent, or after it failed requests; what runs there is sent again elsewhere, and the paths that were
there go on from another engine, which computes their prefixes once. An engine that is back is used again.

A request whose connection was lost may be what the server died of. It is tried at two engines at most, the last time alone.

Waits: at the gate of the chosen engine (`PATIENCE_S`, then another one is chosen), for any engine while all are out (their
hosts end it; `timeout_s`, after which DeadlineError says how each stands), for each answer (see `client`). What runs on an
engine whose host is silent for `SILENT_S` is ended by `watch`, which must run beside the users where there are hosts.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import aiohttp

from treepo_async.engine.answer import Completion, Watch
from treepo_async.engine.client import (
    MAX_LOST_TOGETHER,
    WARM_TOKENS,
    Ask,
    EngineClient,
    SamplingSettings,
    Trouble,
    attempts,
    run_all,
)
from treepo_async.engine.gate import EngineGate
from treepo_async.engine.routing import (
    Choice,
    Choose,
    Meter,
    Move,
    Place,
    Reading,
    Scale,
    Work,
    choose,
)
from treepo_async.errors import ClosedError, DeadlineError, EngineError
from treepo_async.metrics.events import emit

PATIENCE_S = 15.0
"""At a closed gate, as while weights change: longer than any update that is not in trouble; whoever waited in vain is not sent there again before it has opened."""
SILENT_S = 6.0
"""Without a word of its host an engine is out."""
MAX_FAILED = 2
"""Requests that an engine may fail in a row, connections apart, before it is out ..."""
REST_S = 2.0
"""... for so long."""
LOOK_S = 0.05
WATCH_S = 0.25
TELL_S = 1.0


@dataclass(eq=False)
class Member:
    """One engine of a pool."""

    name: str
    """Its address."""
    client: EngineClient
    gate: EngineGate
    meter: Meter = field(default_factory=Meter)
    num_requests: int = 0
    decoded_tokens: int = 0
    """Of completions that came back."""
    running: set[asyncio.Future[Completion]] = field(default_factory=set)
    rests_until: float = 0.0
    """After failures it is out until then, or until it answers."""
    num_failed: int = 0
    """Requests in a row."""
    waited_in_vain: tuple[int, int] | None = None
    """Epoch of the gate and policy step of a request that did not pass."""
    _load_of: tuple[int | None, float] = (None, 0.0)

    def admits(self, least_step: int) -> bool:
        """Whether a request may go there at once."""
        status = self.gate.status()
        return status.is_open and status.version.step >= least_step

    def is_out(self, least_step: int, now: float) -> bool:
        """Whether a request should not go there, not even to wait."""
        status = self.gate.status()
        if status.is_down or status.silent_s > SILENT_S:
            return True
        if now < self.rests_until:
            return True
        if self.admits(least_step) or self.waited_in_vain is None:
            return False
        epoch, step = self.waited_in_vain
        return epoch == status.epoch and least_step >= step

    def failed(self, now: float, *, is_lost: bool) -> None:
        """It has failed a request; `is_lost` with its connection."""
        self.num_failed += 1
        if is_lost or self.num_failed >= MAX_FAILED:
            self.rests_until = now + REST_S

    def answered(self) -> None:
        """A request came back."""
        self.num_failed, self.rests_until = 0, 0.0

    def reading(self, least_step: int, now: float) -> Reading:
        """For a request that needs a policy step."""
        self._hear(now)
        return self.meter.reading(
            now, is_out=self.is_out(least_step, now), is_open=self.admits(least_step)
        )

    def _hear(self, now: float) -> None:
        """Take what the host told of its server's load, once."""
        status = self.gate.status()
        told = (status.num_in_flight, now - status.silent_s)
        if status.num_in_flight is not None and told[1] > self._load_of[1] + LOOK_S:
            self._load_of = told
            self.meter.told(status.num_in_flight, now)


@dataclass(eq=False)
class _Trip:
    """The runs of one request to the pool, which go to one engine together.

    They count as work there from the moment at which it is chosen: whoever chooses next must know.
    """

    home: int | None
    choice: Choice
    booked: Member
    num_booked: int
    """Runs that count there already and have not begun."""
    tokens: int
    """Of each."""

    def begin(self, member: Member, tokens: int, now: float) -> None:
        """A run goes to an engine."""
        if self.num_booked and member is self.booked and tokens == self.tokens:
            self.num_booked -= 1
        else:
            member.meter.add(tokens, now)

    def cancel(self, now: float) -> None:
        """No further run begins."""
        for _ in range(self.num_booked):
            self.booked.meter.remove(self.tokens, now)
        self.num_booked = 0


@dataclass(eq=False)
class _Run:
    """What has befallen one run of a trip."""

    trip: _Trip
    lost_at: list[int] = field(default_factory=list)
    """Engines, each once."""


class EnginePool:
    """See the module. An `actor.expand.Engine`."""

    def __init__(
        self, members: Sequence[Member], *, timeout_s: float, choose: Choose = choose
    ) -> None:
        """Prepare.

        Args:
            members: the engines in the order in which this actor prefers them, its home first.
            timeout_s: longest wait while all are out.
            choose: the engine for a request.
        """
        self._chooser = choose
        self.members = tuple(members)
        scale = Scale()
        for member in members:
            member.meter.scale = scale
        self._index = {member.name: i for i, member in enumerate(self.members)}
        self._timeout_s = timeout_s

    async def warm(
        self, prefix: Sequence[int], *, sampling: SamplingSettings, least_step: int = 0
    ) -> Place:
        """Choose where a tree begins, and put its prompt there. Gives the place, which counts as work until the tree asks for it.

        Raises:
            EngineError, DeadlineError: as `extend`.
        """
        ask = Ask(prefix, 0, sampling, least_step)
        self.members[0].client.check(ask)
        choice = await self._choose(None, ask, 1)
        member = self.members[choice.engine]
        reservation = member.meter.begin(time.monotonic())
        trip = _Trip(None, choice, member, 0, 0)
        if len(prefix) >= WARM_TOKENS:
            await self._complete(trip, ask)
        if trip.choice.engine != choice.engine:
            member.meter.asked(reservation)
            member = self.members[trip.choice.engine]
            reservation = member.meter.begin(time.monotonic())
        return Place(member.name, reservation=reservation)

    async def extend(  # noqa: PLR0913 - see `EngineClient.extend`
        self,
        prefix: Sequence[int],
        *,
        num_runs: int,
        max_new_tokens: int,
        sampling: SamplingSettings,
        least_step: int = 0,
        is_cached: bool = True,
        watch: Watch | None = None,
        arrived: dict[int, Completion] | None = None,
        home: Place | None = None,
    ) -> list[Completion]:
        """Continue a prefix `num_runs` times, all on one engine: see `EngineClient.extend`.

        Raises:
            EngineError: a token id outside the vocabulary, or no good answer in `MAX_ATTEMPTS`.
            NotFiniteError: log-probs that are not.
            DeadlineError: no engine let it pass.
        """
        ask = Ask(prefix, max_new_tokens, sampling, least_step, watch)
        self.members[0].client.check(ask)
        at = None if home is None else self._index.get(home.engine)
        if at is not None and home is not None and home.reservation is not None:
            self.members[at].meter.asked(home.reservation)
        trip = self._book(at, await self._choose(at, ask, num_runs), ask, num_runs)
        stays = trip.choice.move is Move.HOME and not trip.booked.client.has_lost(home)

        async def complete(wanted: Ask) -> Completion:
            return await self._complete(trip, wanted)

        try:
            return await run_all(
                complete, ask, num_runs, is_cached=is_cached and stays, arrived=arrived
            )
        finally:
            trip.cancel(time.monotonic())

    async def watch(self) -> None:
        """End what runs on silent engines, and tell once a second what each has done. For ever."""
        told = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            for member in self.members:
                member.meter.step(now)
                if member.gate.status().silent_s > SILENT_S:
                    for running in member.running:
                        running.cancel()
            if now - told >= TELL_S:
                self._tell()
                told = now

    def describe(self) -> str:
        """How each engine stands."""
        return "; ".join(f"{member.name}: {member.gate.status()}" for member in self.members)

    def _tell(self) -> None:
        for member in self.members:
            emit(
                "route",
                engine=member.name,
                num_requests=member.num_requests,
                decoded_tokens=member.decoded_tokens,
            )
            member.num_requests = member.decoded_tokens = 0

    def _book(self, home: int | None, choice: Choice, ask: Ask, num_runs: int) -> _Trip:
        member, now = self.members[choice.engine], time.monotonic()
        for _ in range(num_runs):
            member.meter.add(ask.max_new_tokens, now)
        return _Trip(home, choice, member, num_runs, ask.max_new_tokens)

    async def _complete(self, trip: _Trip, ask: Ask) -> Completion:
        run = _Run(trip)

        async def attempt(wanted: Ask, trouble: Trouble) -> Completion:
            return await self._attempt(run, wanted, trouble)

        return await attempts(attempt, ask)

    async def _attempt(self, run: _Run, ask: Ask, trouble: Trouble) -> Completion:
        """One try, at the engine of the trip or, where that is out, at another one."""
        while True:
            choice = await self._choice_of(run, ask)
            member = self.members[choice.engine]
            try:
                completion = await self._at(member, ask, run.trip, alone=trouble.needs_solitude)
            except ClosedError:
                member.waited_in_vain = (member.gate.status().epoch, ask.least_step)
                continue
            except aiohttp.ClientError:
                member.client.doubt()
                member.failed(time.monotonic(), is_lost=True)
                if choice.engine not in run.lost_at:
                    run.lost_at.append(choice.engine)
                raise
            except (EngineError, TimeoutError):
                member.failed(time.monotonic(), is_lost=False)
                raise
            member.answered()
            return replace(completion, engine=member.name, move=choice.move)

    async def _at(self, member: Member, ask: Ask, trip: _Trip, *, alone: bool) -> Completion:
        """One try at an engine; `watch` may end it, which counts as a lost connection."""
        trip.begin(member, ask.max_new_tokens, time.monotonic())
        work = asyncio.ensure_future(member.client.attempt(ask, alone=alone, patience_s=PATIENCE_S))
        member.running.add(work)
        try:
            await asyncio.wait([work])
            if work.cancelled():
                raise aiohttp.ServerDisconnectedError(f"the host of {member.name} is silent")
            completion = work.result()
        finally:
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            member.running.discard(work)
            member.meter.remove(ask.max_new_tokens, time.monotonic())
        member.num_requests += 1
        member.decoded_tokens += len(completion.run)
        return completion

    async def _choice_of(self, run: _Run, ask: Ask) -> Choice:
        """The engine for the next try of a run: that of its trip, as long as it is in."""
        trip = run.trip
        if self._may_go(run, trip.choice.engine, ask):
            return trip.choice
        among = None
        if len(run.lost_at) >= MAX_LOST_TOGETHER:
            among = frozenset(run.lost_at)
        trip.choice = await self._choose(trip.home, ask, 1, among=among)
        return trip.choice

    def _may_go(self, run: _Run, engine: int, ask: Ask) -> bool:
        if len(run.lost_at) >= MAX_LOST_TOGETHER and engine not in run.lost_at:
            return False
        return not self.members[engine].is_out(ask.least_step, time.monotonic())

    async def _choose(
        self, home: int | None, ask: Ask, num_runs: int, *, among: frozenset[int] | None = None
    ) -> Choice:
        """Choose an engine; while all are out, wait.

        Args:
            home: that has the prefix.
            ask: what is wanted.
            num_runs: how often.
            among: indices of those that it may be; None: all.
        """
        work = Work(ask.max_new_tokens * num_runs, len(ask.prefix))
        deadline = time.monotonic() + self._timeout_s
        while True:
            now = time.monotonic()
            readings = [
                self._reading(i, among, ask.least_step, now) for i in range(len(self.members))
            ]
            choice = self._chooser(readings, home, work)
            if choice is not None:
                return choice
            if now > deadline:
                wait = f"an engine for policy step {ask.least_step} or later ({self.describe()})"
                raise DeadlineError(wait, "one of the engine hosts", self._timeout_s)
            await asyncio.sleep(LOOK_S)

    def _reading(
        self, index: int, among: frozenset[int] | None, least_step: int, now: float
    ) -> Reading:
        reading = self.members[index].reading(least_step, now)
        return reading if among is None or index in among else reading._replace(is_out=True)
