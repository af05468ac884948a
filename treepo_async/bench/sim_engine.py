"""An engine in simulated time: requests that share a decode step, prefill that holds them up, and new weights.

All running requests advance together: a decode step of n requests takes `step_s + n * token_s` and gives each one token.
A request that begins holds the others up for its prefill. More than `max_running` wait in order.

New weights, by mode, from when the host looks for them (`engine.host` does the same with a real server):

    drain      let nothing in; once the running requests have ended: load; open
    retract    stop; load; running requests compute their prefix again; go on
    in_place   stop; load; go on

Invariants: every request that is submitted ends once; its tokens are told by the version that decoded them; versions
only grow.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from treepo_async.bench.sim_clock import Clock, Stopwatch

Pieces = dict[int, int]
"""Tokens by the policy step of the weights that decoded them."""
MODES = ("drain", "retract", "in_place")
LOOK_S = 0.05
"""How often a host looks for weights (`engine.host`)."""
_ROUNDING = 1e-7
"""In decode steps."""


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """Service times."""

    step_s: float = 0.0025
    """Of a decode step, whatever its size."""
    token_s: float = 0.00017
    """More for each request in it."""
    request_s: float = 0.00165
    """For taking a request in: prefill of its last token, scheduling."""
    prefix_token_s: float = 0.0
    """For each token of a prefix that is not in the cache."""
    max_running: int = 64

    def step(self, running: int) -> float:
        """Seconds of a decode step."""
        return self.step_s + running * self.token_s


@dataclass(eq=False, slots=True)
class SimRequest:
    """Tokens that are asked for."""

    tokens: int
    context: int
    """Tokens before them."""
    cached_by: int
    """Version whose cache has the context; -1: none."""
    least_version: int
    done: Callable[[Pieces], None]
    pieces: Pieces = field(default_factory=dict)
    begun: float = 0.0
    """Decode steps of the engine until it began."""
    shut_at: float | None = None
    """Since when, where it is shut out."""
    shut_s: float = 0.0
    """Before a gate, or for a version."""

    def take_shut(self, now: float) -> float:
        """Seconds since the last call in which it was shut out."""
        if self.shut_at is not None:
            self.shut_s, self.shut_at = self.shut_s + now - self.shut_at, now
        shut_s, self.shut_s = self.shut_s, 0.0
        return shut_s


class SimEngine:
    """One engine; see the module."""

    def __init__(self, clock: Clock, speed: EngineSpeed, mode: str) -> None:
        self._clock, self._speed, self._mode = clock, speed, mode
        self.version = 0
        self.decoded = 0
        """Tokens."""
        self.watch = Stopwatch(clock)
        self.pauses: list[float] = []
        """Seconds of each update without a new request."""
        self._running: list[tuple[float, int, SimRequest]] = []
        """By the decode step in which they end."""
        self._queue: deque[SimRequest] = deque()
        self._shut_out: list[SimRequest] = []
        """Until the gate opens, or a version comes."""
        self._steps, self._seen_at, self._held_until = 0.0, 0.0, 0.0
        self._number = self._plan_number = 0
        self._is_unplanned = False
        self._newest, self._loading, self._load_s = 0, 0, 0.0
        self._is_updating = self._is_draining = False
        self._closed_at = 0.0

    @property
    def load(self) -> int:
        """Requests that are here."""
        return len(self._running) + len(self._queue) + len(self._shut_out)

    def submit(self, request: SimRequest) -> None:
        """Decode; `request.done` is called at the end."""
        self._let_in(request)
        if not self._is_unplanned:
            # one plan for all that is submitted at once
            self._is_unplanned = True
            self._clock.after(0.0, self._plan)

    def offer(self, version: int, load_s: float) -> None:
        """Weights are there, and loading them takes so long; older ones that wait are passed over."""
        self._newest, self._load_s = max(self._newest, version), load_s
        if not self._is_updating:
            self._is_updating = True
            self._clock.after(LOOK_S / 2, self._close)

    # ---------------------------------------------------------------- requests

    def _let_in(self, request: SimRequest) -> None:
        is_closed = self._is_draining or self._loading > self.version
        if is_closed or request.least_version > self.version:
            request.shut_at = self._clock.now
            self._shut_out.append(request)
        elif len(self._running) < self._speed.max_running:
            self._start(request)
        else:
            self._queue.append(request)

    def _start(self, request: SimRequest) -> None:
        self._advance()
        uncached = request.context if request.cached_by != self.version else 0
        self._hold(self._speed.request_s + uncached * self._speed.prefix_token_s)
        request.begun = self._steps
        self._number += 1
        heapq.heappush(self._running, (self._steps + request.tokens, self._number, request))

    def _end_some(self, plan: int) -> None:
        if plan != self._plan_number:
            return
        self._advance()
        ended = list[SimRequest]()
        while self._running and self._running[0][0] <= self._steps + _ROUNDING:
            ended.append(heapq.heappop(self._running)[2])
        while self._queue and len(self._running) < self._speed.max_running:
            self._start(self._queue.popleft())
        for request in ended:
            self.decoded += request.tokens
            self._cut(request, request.tokens)
            request.done(request.pieces)
        if self._is_draining and not (self._running or self._queue):
            self._is_draining = False
            self._begin_to_load()
        self._plan()

    def _cut(self, request: SimRequest, until: int) -> None:
        """Its tokens up to `until` that are not told yet are of the version that is here."""
        tokens = until - sum(request.pieces.values())
        if tokens:
            request.pieces[self.version] = request.pieces.get(self.version, 0) + tokens

    # ---------------------------------------------------------------- time

    def _advance(self) -> None:
        """Decode until the present."""
        begin = max(self._seen_at, self._held_until)
        if self._running and self._clock.now > begin:
            self._steps += (self._clock.now - begin) / self._speed.step(len(self._running))
        self._seen_at = self._clock.now

    def _hold(self, seconds: float) -> None:
        """Decode nothing for so long."""
        self._held_until = max(self._clock.now, self._held_until) + seconds

    def _plan(self) -> None:
        """Come back when the next request ends."""
        self._is_unplanned = False
        self._plan_number += 1
        if self._loading > self.version:
            return
        self._advance()
        # a closed gate is an update, whatever still runs behind it
        working = "sync" if self._is_draining else "compute"
        self.watch.switch(working if self._running else "idle")
        if self._running:
            left = max(0.0, self._running[0][0] - self._steps)
            held = max(0.0, self._held_until - self._clock.now)
            until = held + left * self._speed.step(len(self._running))
            plan = self._plan_number
            self._clock.after(until, lambda: self._end_some(plan))

    # ---------------------------------------------------------------- weights

    def _close(self) -> None:
        self._closed_at = self._clock.now
        if self._mode == "drain" and (self._running or self._queue):
            self._is_draining = True
            self.watch.switch("sync")
        else:
            self._begin_to_load()

    def _begin_to_load(self) -> None:
        self._advance()
        self._loading = self._newest
        self.watch.switch("sync")
        self._plan()
        self._clock.after(self._load_s, self._apply)

    def _apply(self) -> None:
        """The weights are in; whatever was running goes on from where it stood."""
        self._seen_at = self._clock.now
        self._held_until = self._clock.now
        for _, _, request in self._running:
            got = int(self._steps - request.begun + _ROUNDING)
            self._cut(request, got)
            if self._mode == "retract":
                self._hold((request.context + got) * self._speed.prefix_token_s)
        self.version = self._loading
        self.pauses.append(self._clock.now - self._closed_at)
        waiting, self._shut_out = self._shut_out, []
        for request in waiting:
            request.shut_s += self._clock.now - (request.shut_at or 0.0)
            request.shut_at = None
            self._let_in(request)
        self._is_updating = self._newest > self.version
        if self._is_updating:
            self._clock.after(LOOK_S / 2, self._close)
        self._plan()
