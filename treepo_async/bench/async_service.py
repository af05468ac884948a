"""The engine of the scripted arms: it decodes nothing, and takes the time that decoding would take, asleep.

A path's length is lognormal, cut off at the response limit, and a token takes a fixed time however many requests run: an
engine far from its largest batch, which is bound by the memory bandwidth of one step. So the time of a response is as
heavy-tailed as its length, and CPUs are idle while it passes. Neighbours: `async_roles` has the processes; the gate is that
of a run, so a request is submitted, paused and versioned as on a real host.

Waits: for the gate to open (its host; the deadline is `GateClient`'s), for the time of the tokens.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from treepo_async.engine.answer import Completion, Watch
from treepo_async.engine.client import SamplingSettings
from treepo_async.engine.gate import EngineGate
from treepo_async.engine.routing import Place
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.types import PolicyVersion

EOS = 1
VOCAB_SIZE = 256
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Service:
    """How long things take."""

    median_tokens: float
    """Of a response."""
    tail: float
    """99th percentile over median."""
    token_s: float
    prefill_token_s: float
    """Of a context that is computed again."""
    chunk_tokens: int
    """After so many tokens a running request sees new weights."""

    @property
    def sigma(self) -> float:
        """Of the logarithm of a length."""
        return float(np.log(self.tail)) / _NORMAL.inv_cdf(0.99)

    def draw_length(self, after: int, rng: random.Random) -> int:
        """Length of a response that is known to be longer than `after` tokens.

        Source: a lognormal restricted to what is left of it, by the inverse of its distribution function.
        """
        low = 0.0 if after == 0 else _NORMAL.cdf(np.log(after / self.median_tokens) / self.sigma)
        share = low + (1.0 - low) * rng.random()
        spread = _NORMAL.inv_cdf(min(max(share, 1e-12), 1 - 1e-12))
        return max(after + 1, round(self.median_tokens * float(np.exp(self.sigma * spread))))


class GateTally:
    """What one actor's trees do to its engine: how long they stood at a closed gate, and when requests ran."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Nothing stands yet, and nothing runs."""
        self._clock = clock
        self._before = 0.0
        self._since: dict[object, float] = {}
        self._num_running = 0
        self._busy_since = 0.0
        self._busy: list[tuple[float, float]] = []

    def stand(self, tree: object) -> None:
        """A tree stands still."""
        self._since[tree] = self._clock()

    def go(self, tree: object) -> None:
        """It goes on, or has come to its end."""
        if tree in self._since:
            self._before += self._clock() - self._since.pop(tree)

    def seconds(self) -> float:
        """Of trees that stood with all of their requests, so far; those that stand now included."""
        now = self._clock()
        return self._before + sum(now - begin for begin in self._since.values())

    def begin_request(self) -> None:
        """A request of any tree begins to run."""
        self._num_running += 1
        if self._num_running == 1:
            self._busy_since = self._clock()

    def end_request(self) -> None:
        """It has ended, or stands at the gate."""
        self._num_running -= 1
        if not self._num_running:
            self._busy.append((self._busy_since, self._clock()))

    def take_busy(self) -> list[tuple[float, float]]:
        """Begins and ends of the times since the last call in which at least one request ran."""
        taken, self._busy = self._busy, []
        if self._num_running:
            now = self._clock()
            taken.append((self._busy_since, now))
            self._busy_since = now
        return taken


@dataclass(eq=False)
class TimedEngine:
    """An `actor.expand.Engine` for one tree."""

    service: Service
    gate: EngineGate
    update_mode: UpdateMode
    prompt_tokens: int
    rng: random.Random
    tally: GateTally
    clock: Callable[[], float] = time.monotonic
    _num_running: int = 0
    _num_at_gate: int = 0

    async def warm(
        self, prefix: Sequence[int], *, sampling: SamplingSettings, least_step: int = 0
    ) -> Place:
        """See `EngineClient.warm`; a prefix this short is not worth a request."""
        return Place("")

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
        """See `EngineClient.extend`."""
        runs = (self._complete(len(prefix), max_new_tokens, least_step) for _ in range(num_runs))
        return list(await asyncio.gather(*runs))

    async def _complete(self, num_prefix: int, max_new_tokens: int, least_step: int) -> Completion:
        start = num_prefix - self.prompt_tokens
        length = self.service.draw_length(start, self.rng) - start
        is_ended, num_tokens = length <= max_new_tokens, min(length, max_new_tokens)
        self._arrive()
        async with self.gate.passage(least_step) as version:
            self._go_on()
            spans = await self._decode(num_prefix, num_tokens, version)
            self._stop(at_gate=False)
        tokens = np.array([self.rng.randrange(2, VOCAB_SIZE) for _ in range(num_tokens)], np.int32)
        if is_ended:
            tokens[-1] = EOS
        return Completion(
            run=Run(tokens, np.full(num_tokens, -1.0, np.float32), spans),
            prefix_tokens=num_prefix,
            cached_tokens=num_prefix - 1,
            overhead_s=0.0,
        )

    async def _decode(
        self, num_prefix: int, num_tokens: int, version: PolicyVersion
    ) -> tuple[VersionSpan, ...]:
        """Sleep, and note under which versions."""
        service = self.service
        if self.update_mode is UpdateMode.DRAIN:
            await asyncio.sleep(num_tokens * service.token_s)
            return (VersionSpan(version, num_tokens),)
        spans: list[VersionSpan] = []
        submitted, num_done, due = version, 0, self.clock()
        while num_done < num_tokens:
            num_new = min(service.chunk_tokens, num_tokens - num_done)
            due += num_new * service.token_s
            await asyncio.sleep(due - self.clock())
            num_done += num_new
            mixed = self.update_mode is UpdateMode.IN_PLACE and version != submitted
            spans.append(VersionSpan(version, num_new, mixed))
            paused, before = self.clock(), version
            self._stop(at_gate=True)
            # the weights that the next tokens are sampled under; a paused server is waited for here
            async with self.gate.passage() as version:
                due += self.clock() - paused
            self._go_on()
            if version != before and self.update_mode is UpdateMode.RETRACT:
                due += (num_prefix + num_done) * service.prefill_token_s
        return _joined(spans)

    def _arrive(self) -> None:
        self._num_at_gate += 1
        self._settle()

    def _go_on(self) -> None:
        self._num_at_gate -= 1
        self._num_running += 1
        self.tally.begin_request()
        self._settle()

    def _stop(self, *, at_gate: bool) -> None:
        self._num_running -= 1
        self.tally.end_request()
        self._num_at_gate += at_gate
        self._settle()

    def _settle(self) -> None:
        self.tally.go(self)
        if self._num_at_gate and not self._num_running:
            self.tally.stand(self)


def _joined(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Neighbours of one version as one."""
    joined: list[VersionSpan] = []
    for span in spans:
        if joined and joined[-1].policy_version == span.policy_version:
            joined[-1] = span._replace(num_tokens=joined[-1].num_tokens + span.num_tokens)
        else:
            joined.append(span)
    return tuple(joined)
