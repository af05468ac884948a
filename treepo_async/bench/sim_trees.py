"""Trees for the simulator: which requests a tree makes of its engine, drawn from a distribution of response lengths.

Neighbours: `tree.growth` grows real trees by the same rules: forks at multiples of a segment, `branch` for every path of
a round, those of ended paths given to the ones that go on, requests to completion once the width is reached. Left
out: fallbacks from an ended path before its end, budgets, pruning. A tree that has less than its width when all paths
have ended begins again at the prompt.

Invariant: a path's length is a draw from the distribution, given that it is longer than where the path stands.
"""

import bisect
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Protocol

_NORMAL = NormalDist()
_LEAST, _MOST = 1e-12, 1 - 1e-12
GROWTHS = ("barrier", "eager", "independent")


class Lengths(Protocol):
    """Of responses, in tokens."""

    def draw(self, above: int, rng: random.Random) -> float:
        """A length, given that it is more than `above`."""


@dataclass(frozen=True)
class LogNormal:
    """Heavy-tailed."""

    median: float
    """Tokens."""
    tail: float
    """The length that one response in a hundred exceeds, over the median; at least 1."""

    def draw(self, above: int, rng: random.Random) -> float:
        """See `Lengths`; by the inverse of the distribution function."""
        sigma = math.log(self.tail) / _NORMAL.inv_cdf(0.99)
        if sigma == 0:
            return self.median if self.median > above else math.inf
        low = _NORMAL.cdf(math.log(above / self.median) / sigma) if above else 0.0
        place = min(max(low + rng.random() * (1 - low), _LEAST), _MOST)
        return max(self.median * math.exp(sigma * _NORMAL.inv_cdf(place)), above + 1)


@dataclass(frozen=True)
class Seen:
    """Lengths that were recorded, in ascending order; what is longer than all of them never ends by itself."""

    lengths: tuple[int, ...]

    def draw(self, above: int, rng: random.Random) -> float:
        """See `Lengths`."""
        first = bisect.bisect_right(self.lengths, above)
        if first == len(self.lengths):
            return math.inf
        return self.lengths[rng.randrange(first, len(self.lengths))]


@dataclass(frozen=True)
class TreeShape:
    """How trees grow; the keys of `tree`."""

    segment_tokens: int = 10
    max_depth: int = 7
    width: int = 16
    branch: int = 2
    first_fork: int = 2
    growth: str = "barrier"
    """One of `GROWTHS`."""
    prompt_tokens: int = 64

    @property
    def response_tokens(self) -> int:
        """The limit."""
        return self.segment_tokens * self.max_depth


@dataclass(frozen=True, slots=True)
class Request:
    """Tokens of one path that are decoded without a pause."""

    parent: int
    """Request that it goes on from, by place in the plan; -1: the prompt."""
    begin: int
    """Response tokens before it."""
    tokens: int
    round: int
    """Of a tree with barriers."""


@dataclass(frozen=True)
class Plan:
    """A tree, as its engine sees it: parents come before children."""

    requests: tuple[Request, ...]
    leaf_tokens: int
    """Tokens counted once for each leaf they lead to."""

    @property
    def tokens(self) -> int:
        """Each counted once."""
        return sum(request.tokens for request in self.requests)

    @property
    def num_rounds(self) -> int:
        """One more than the last."""
        return self.requests[-1].round + 1


class _Draft:
    """A plan in the making."""

    def __init__(self, shape: TreeShape, lengths: Lengths, rng: random.Random) -> None:
        self._shape, self._lengths, self._rng = shape, lengths, rng
        self.requests: list[Request] = []
        self.ends: list[int] = []
        """Lengths of the leaves."""

    def ask(self, parent: int, round: int, *, to_end: bool) -> int | None:
        """Add a request. Gives its place if the path goes on behind it, else None."""
        shape = self._shape
        begin = 0 if parent < 0 else self.requests[parent].begin + self.requests[parent].tokens
        whole = min(math.ceil(self._draw(begin)), shape.response_tokens)
        end = whole if to_end else min(whole, begin + shape.segment_tokens)
        self.requests.append(Request(parent, begin, end - begin, round))
        if end == whole:
            self.ends.append(end)
            return None
        return len(self.requests) - 1

    def _draw(self, begin: int) -> float:
        return min(self._lengths.draw(begin, self._rng), self._shape.response_tokens)


def draw_plan(shape: TreeShape, lengths: Lengths, rng: random.Random) -> Plan:
    """A tree."""
    draft = _Draft(shape, lengths, rng)
    if shape.growth == "independent":
        for _ in range(shape.width):
            draft.ask(-1, 0, to_end=True)
        return Plan(tuple(draft.requests), sum(draft.ends))
    forks, number = _at_prompt(shape, draft), 0
    while forks:
        room = shape.width - len(draft.ends)
        to_end = len(forks) >= room
        lasts = [draft.ask(parent, number, to_end=to_end) for parent in forks]
        alive = [last for last in lasts if last is not None]
        forks = _next_forks(shape, draft, alive, len(lasts)) if alive else _at_prompt(shape, draft)
        number += 1
    return Plan(tuple(draft.requests), sum(draft.ends))


def resized(plan: Plan, factor: float, rng: random.Random) -> Plan:
    """The tree with requests of `factor` times their tokens, rounded so that the mean is kept, but at least 1."""
    requests = list[Request]()
    for old in plan.requests:
        before = requests[old.parent] if old.parent >= 0 else None
        begin = before.begin + before.tokens if before else 0
        tokens = max(1, math.floor(old.tokens * factor + rng.random()))
        requests.append(replace(old, begin=begin, tokens=tokens))
    return Plan(tuple(requests), round(plan.leaf_tokens * factor))


def _at_prompt(shape: TreeShape, draft: _Draft) -> list[int]:
    return [-1] * min(shape.first_fork, shape.width - len(draft.ends))


def _next_forks(
    shape: TreeShape, draft: _Draft, alive: Sequence[int], num_before: int
) -> list[int]:
    """The paths of the next round by what they go on from: those of ended paths are dealt to the others."""
    room = shape.width - len(draft.ends)
    wanted = max(len(alive), min(room, shape.branch * num_before))
    return sorted(alive[i % len(alive)] for i in range(wanted))
