"""How one tree grows: rounds of extensions with a barrier per prompt (TreePO, section 2.2 and Algorithm 1).

A round asks the engine to extend every active path; when all runs of the round are back, the next round is
planned from this tree's counts alone. Three rules shape it:

* budget transfer: forks of paths that ended are given to the survivors, up to `width` in all;
* fallback: with no survivor and fewer than `width` leaves, ended paths are forked again at a segment boundary;
* run to completion: once finished + active = width no fork can follow, so each path is asked for its rest.

Invariant: finished + active <= width, and exactly `width` leaves in the end unless fallback is off.
"""

import random
from dataclasses import dataclass, field
from typing import NamedTuple

from treepo_async.tree.cut import Run, cut
from treepo_async.types import ROOT, Segment, StopReason, path_of


@dataclass(frozen=True, slots=True)
class GrowthRules:
    """The knobs of a tree's shape."""

    segment_tokens: int
    max_depth: int
    width: int
    branching_factor: int
    first_fork_min: int
    first_fork_max: int
    fallback: bool
    max_response_tokens: int | None = None

    @property
    def limit(self) -> int:
        """Most response tokens of a path."""
        by_depth = self.segment_tokens * self.max_depth
        return (
            by_depth
            if self.max_response_tokens is None
            else min(by_depth, self.max_response_tokens)
        )

    @property
    def limit_reason(self) -> StopReason:
        """Why a path ends that reaches the limit."""
        wanted = self.max_response_tokens or self.limit
        return StopReason.LENGTH if wanted <= self.limit else StopReason.DEPTH


class Extension(NamedTuple):
    """A request to the engine: continue one path `num_runs` times."""

    parent: int
    """Index of the path's last segment, or `ROOT`."""
    start: int
    """Response tokens already on the path."""
    max_new_tokens: int
    num_runs: int


@dataclass
class Growth:
    """One tree while it grows. `plan()` a round, `add()` each of its runs, until `plan()` is empty."""

    rules: GrowthRules
    rng: random.Random
    segments: list[Segment] = field(default_factory=list)
    num_fallbacks: int = 0
    """Runs that were forked from an ended path."""
    _finished: list[int] = field(default_factory=list)
    _survivors: list[int] = field(default_factory=list)
    _num_ended: int = 0
    _ends: list[int] = field(default_factory=list)
    _started: bool = False

    def plan(self) -> list[Extension]:
        """The next round, in the order in which it should be submitted; empty when the tree is complete."""
        if not self._started:
            self._started = True
            parents = [(ROOT, self._first_fork())]
        elif self._survivors:
            parents = list(zip(self._survivors, self._split(self._budget()), strict=True))
        else:
            parents = self._fall_back()
        self._survivors, self._num_ended = [], 0
        saturated = len(self._finished) + sum(n for _, n in parents) == self.rules.width
        return [self._extension(parent, n, saturated) for parent, n in parents]

    def add(self, extension: Extension, run: Run, stop: StopReason | None) -> None:
        """Record one run of the current round.

        Args:
            extension: the request it answers.
            run: its tokens up to and including the stop, at least one.
            stop: why the path ended, None if only the request's `max_new_tokens` ended it.
        """
        end = extension.start + len(run)
        if stop is None and end >= self.rules.limit:
            stop = self.rules.limit_reason
        for segment in cut(
            run,
            parent=extension.parent,
            first_index=len(self.segments),
            start=extension.start,
            segment_tokens=self.rules.segment_tokens,
            stop=stop,
        ):
            self._ends.append(self._end(segment.parent) + len(segment))
            self.segments.append(segment)
        if stop is None:
            self._survivors.append(len(self.segments) - 1)
        else:
            self._finished.append(len(self.segments) - 1)
            self._num_ended += 1

    def notes(self) -> tuple[str, ...]:
        """What makes the complete tree differ from its rules."""
        missing = self.rules.width - len(self._finished)
        return (f"{missing} leaves fewer than the width: fallback is off",) if missing else ()

    def path(self, parent: int) -> tuple[int, ...]:
        """Segment indices from the prompt down to `parent`."""
        return path_of(self.segments, parent)

    def _end(self, parent: int) -> int:
        """Response tokens on the path up to and including `parent`."""
        return 0 if parent == ROOT else self._ends[parent]

    def _extension(self, parent: int, num_runs: int, saturated: bool) -> Extension:
        start = self._end(parent)
        to_grid = self.rules.segment_tokens - start % self.rules.segment_tokens
        rest = self.rules.limit - start
        return Extension(parent, start, rest if saturated else min(to_grid, rest), num_runs)

    def _first_fork(self) -> int:
        return min(
            self.rng.randint(self.rules.first_fork_min, self.rules.first_fork_max), self.rules.width
        )

    def _budget(self) -> int:
        """Active paths of the next round: forks of ended paths go to the survivors, capped by the width."""
        active, room = len(self._survivors), self.rules.width - len(self._finished)
        return max(active, min(room, self.rules.branching_factor * (self._num_ended + active)))

    def _split(self, budget: int) -> list[int]:
        """Even shares of the budget, the remainder spread at random."""
        share, remainder = divmod(budget, len(self._survivors))
        lucky = set(self.rng.sample(range(len(self._survivors)), remainder))
        return [share + (i in lucky) for i in range(len(self._survivors))]

    def _fall_back(self) -> list[tuple[int, int]]:
        """Fork the paths that ended by EOS or box again, at random boundaries; the prompt if there are none."""
        missing = self.rules.width - len(self._finished)
        if missing == 0 or not self.rules.fallback:
            return []
        answered = (StopReason.EOS, StopReason.BOXED)
        candidates = [leaf for leaf in self._finished if self.segments[leaf].stop in answered]
        self.rng.shuffle(candidates)
        forks: list[tuple[int, int]] = []
        for leaf in candidates or [ROOT]:
            num_runs = min(self.rules.branching_factor, missing - sum(n for _, n in forks))
            if num_runs > 0:
                forks.append((self._random_boundary(leaf), num_runs))
        self.num_fallbacks += sum(n for _, n in forks)
        return forks

    def _random_boundary(self, leaf: int) -> int:
        """A segment of the leaf's path that ends on the grid, or `ROOT`; the last level is always redone."""
        if leaf == ROOT:
            return ROOT
        level = self.rng.randint(0, self.segments[leaf].level)
        above = [i for i in self.path(leaf) if self.segments[i].level < level]
        return above[-1] if above else ROOT
