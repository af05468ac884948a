"""Which of several engines gets a request, decided from what an actor knows of each. No I/O, no clock, no randomness.

A path goes on where its prefix is cached: at the engine that decoded its last segment. It leaves it for two reasons.
It spills when that engine has much more to do than another one: never more than the actor itself has put there,
so that several actors which see the same idle engine do not all run to it. And it migrates when that engine is out. A tree begins
on the engine with the least to do. Work is counted in tokens to be decoded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from treepo_async.types import PolicyVersion

SPILL_RATIO = 1.5
"""An engine is overloaded when it has this many times the work of another one ..."""
SPILL_REQUESTS = 4.0
"""... and so many times the request's own work more than it ..."""
PREFILL_SHARE = 1 / 16
"""... and more than what computing the prefix again costs: this share of decoding as many tokens."""
SMOOTH_S = 3.0
"""Time constant of the mean of an engine's work. Trees ask in waves, whose crests are no overload."""
BEGIN_S = 30.0
"""A tree that has begun on an engine asks by then."""
SCALE_RATE = 0.05
"""Weight of the newest request in the mean size."""


class Place(NamedTuple):
    """Where the KV entries of a prefix are."""

    engine: str
    """Its name."""
    version: PolicyVersion | None = None
    """Under which they were computed; None: not known."""
    reservation: int | None = None
    """Of the tree that begins there, until its first request comes; None: of no tree."""


class Move(StrEnum):
    """How an engine was chosen."""

    HOME = "home"
    """It has the prefix, or the tree begins on it."""
    SPILLED = "spilled"
    """The one that has the prefix has too much to do."""
    MIGRATED = "migrated"
    """The one that has the prefix is out."""


class Work(NamedTuple):
    """What a request costs, in tokens."""

    decode: int
    """At most; of all its runs."""
    prefix: int


class Reading(NamedTuple):
    """What an actor knows of an engine at a moment."""

    is_out: bool
    """No request may go there."""
    is_open: bool
    """A request that goes there need not wait."""
    load: float
    """Work of all actors there."""
    mean_load: float
    """Mean of the last seconds."""
    own_load: float
    """The actor's own part of `load`."""

    @property
    def high(self) -> float:
        """The work it has at least for a while to come: one that is between two waves is not idle."""
        return max(self.load, self.mean_load)

    @property
    def low(self) -> float:
        """The work that it had for a while and has still: one that has just got a wave is not overloaded."""
        return min(self.load, self.mean_load)


class Choice(NamedTuple):
    """An engine, by its index, and why."""

    engine: int
    move: Move


Choose = Callable[[Sequence[Reading], int | None, Work], Choice | None]
"""See `choose`, which is one."""


def choose(readings: Sequence[Reading], home: int | None, work: Work) -> Choice | None:
    """The engine for a request; None if all are out.

    Args:
        readings: of all engines, in the actor's own order, which decides among equals.
        home: index of the one that has the prefix; None where a tree begins.
        work: of the request.
    """
    there = [i for i, reading in enumerate(readings) if not reading.is_out]
    if not there:
        return None
    if home is None:
        # also at a gate that is closed for a moment: else all trees of a step begin where it opens first
        return Choice(min(there, key=lambda i: (readings[i].high, i)), Move.HOME)
    least = min(there, key=lambda i: (not readings[i].is_open, readings[i].high, i))
    if readings[home].is_out:
        return Choice(least, Move.MIGRATED)
    if readings[least].is_open and is_overloaded(readings[home], readings[least], work):
        return Choice(least, Move.SPILLED)
    return Choice(home, Move.HOME)


def is_overloaded(home: Reading, other: Reading, work: Work) -> bool:
    """Whether a request should leave its home for another engine."""
    gain = home.low - other.high
    cost = work.prefix * PREFILL_SHARE
    return (
        gain > max(SPILL_REQUESTS * work.decode, cost)
        and home.low > SPILL_RATIO * other.high
        and home.own_load - other.own_load > work.decode
    )


@dataclass
class Scale:
    """How large an actor's requests are."""

    tokens: float = 1.0
    """Of a request, the newest counting most."""
    _num_seen: int = 0

    def see(self, tokens: float) -> None:
        """Take one."""
        self._num_seen += 1
        self.tokens += max(1 / self._num_seen, SCALE_RATE) * (tokens - self.tokens)


@dataclass
class Meter:
    """The work of one engine, as one actor sees it."""

    scale: Scale = field(default_factory=Scale)
    """Of the actor's requests to all engines, by which those of others are measured."""
    own: float = 0.0
    """Tokens of this actor's requests in flight."""
    num_own: int = 0
    """These requests."""
    num_others: int = 0
    """Requests of others in flight, as the host told."""
    begun: dict[int, float] = field(default_factory=dict)
    """When trees began there that have not asked yet, by their reservations; each counts as a request."""
    _num_begun: int = 0
    _mean: float = 0.0
    _seen_at: float = 0.0

    def begin(self, now: float) -> int:
        """A tree begins there, and will ask. Gives its reservation."""
        self._num_begun += 1
        self.begun[self._num_begun] = now
        return self._num_begun

    def asked(self, reservation: int) -> None:
        """It asks, for the first time or again."""
        self.begun.pop(reservation, None)

    def add(self, tokens: float, now: float) -> None:
        """A request goes there."""
        self.step(now)
        self.own += tokens
        self.num_own += 1
        if tokens:
            # one that only computes a prefix says nothing of how much others decode
            self.scale.see(tokens)

    def remove(self, tokens: float, now: float) -> None:
        """It is back."""
        self.step(now)
        self.own -= tokens
        self.num_own -= 1

    def told(self, num_in_flight: int, now: float) -> None:
        """The host told how many requests its server has, this actor's among them."""
        self.step(now)
        self.num_others = max(0, num_in_flight - self.num_own)

    def step(self, now: float) -> None:
        """Let the mean follow what the load has been since the last call."""
        keep = math.exp(-max(0.0, now - self._seen_at) / SMOOTH_S)
        self._mean = keep * self._mean + (1 - keep) * self._flowing
        self._seen_at = now

    def reading(self, now: float, *, is_out: bool, is_open: bool) -> Reading:
        """What is known at `now`."""
        self.step(now)
        # one that ended before it asked is forgotten
        self.begun = {r: begun for r, begun in self.begun.items() if now - begun < BEGIN_S}
        coming = len(self.begun) * self.scale.tokens
        return Reading(is_out, is_open, self._flowing + coming, self._mean + coming, self.own)

    @property
    def _flowing(self) -> float:
        return self.own + self.num_others * self.scale.tokens
