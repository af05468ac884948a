"""A tree while it grows: its segments, which paths have ended and why, and what may still be added.

The rounds of `growth` work on it; nothing here decides which path is continued.
"""

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from treepo_async.tree.cut import Run, VersionSpan, cut
from treepo_async.tree.prune import PRUNE, judge
from treepo_async.tree.rules import GrowthRules, PartialPath, PruneRules
from treepo_async.types import ROOT, Segment, StopReason, leaves_of, path_of


class Extension(NamedTuple):
    """A request to the engine: continue one path `num_runs` times."""

    parent: int
    """Index of the path's last segment, or `ROOT`."""
    start: int
    """Response tokens already on the path."""
    max_new_tokens: int
    num_runs: int
    number: int = 0
    """Of the requests of this tree."""


@dataclass
class GrowingTree:
    """See the module."""

    rules: GrowthRules
    prune: PruneRules
    rng: random.Random
    segments: list[Segment] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    """Last segments of the paths that are complete."""
    pruned: list[int] = field(default_factory=list)
    """Last segments of the paths that were pruned."""
    outdated: list[int] = field(default_factory=list)
    """Those of them that were whole, and too old in the end."""
    width: int = field(init=False)
    """Paths the tree is to have: less than the rule's where pruned ones are not refilled."""
    _ends: list[int] = field(default_factory=list)
    _oldest: list[int] = field(default_factory=list)
    """Lowest policy step on the path to each segment."""
    _newest: int = 0
    """Policy step."""
    _num_extensions: int = 0

    def __post_init__(self) -> None:
        self.width = self.rules.width

    @property
    def room(self) -> int:
        """Paths that may be active."""
        return self.width - len(self.finished)

    def end(self, parent: int) -> int:
        """Response tokens on the path up to and including `parent`."""
        return 0 if parent == ROOT else self._ends[parent]

    def rest(self, parent: int) -> int:
        """Tokens from there to the limit."""
        return self.rules.limit - self.end(parent)

    def extension(self, parent: int, num_runs: int, *, to_completion: bool) -> Extension:
        """A request: to the next boundary, or to the limit."""
        start, rest = self.end(parent), self.rest(parent)
        to_grid = self.rules.segment_tokens - start % self.rules.segment_tokens
        self._num_extensions += 1
        max_new_tokens = rest if to_completion else min(to_grid, rest)
        return Extension(parent, start, max_new_tokens, num_runs, self._num_extensions)

    def record(self, extension: Extension, run: Run, stop: StopReason | None) -> int | None:
        """Add a run to the tree. Gives its last segment if the path can go on, else None.

        Args:
            extension: the request it answers.
            run: its tokens.
            stop: why the path ended; PRUNED where it was too old to go on, see `is_stale`.
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
            self._append(segment)
        last = len(self.segments) - 1
        if stop is None:
            return last
        if stop is StopReason.PRUNED:
            self._prune(last)
        else:
            self.finished.append(last)
        return None

    def without_pruned(self, survivors: list[int], num_others: int = 0) -> list[int]:
        """Prune what the rules say among the paths that could go on, and the whole ones that are too old by now.

        Args:
            survivors: last segments of the paths that could go on.
            num_others: paths that are active beside them.

        Returns:
            What is left of the survivors.
        """
        self.drop_stale()
        stale = [i for i in survivors if self.is_stale(i)]
        for i in stale:
            self._prune(i)
        left = [i for i in survivors if i not in stale]
        num_active = len(left) + num_others
        if not self.prune.judges:
            return left
        judged = [*left, *self.finished] if self.prune.value is not None else left
        views = {i: self._view(i) for i in judged}
        return [i for i in left if self._passes(i, views, num_active)]

    def is_stale(self, parent: int, spans: Sequence[VersionSpan] = ()) -> bool:
        """Whether a path is too old beside the newest token of the tree.

        Args:
            parent: its last segment, or `ROOT`.
            spans: of its tokens behind that one, which are not in the tree.
        """
        bound = self.prune.max_staleness
        if bound is None:
            return False
        steps = [span.policy_version.step for span in spans]
        oldest = steps if parent == ROOT else [*steps, self._oldest[parent]]
        return bool(oldest) and min(oldest) < max([*steps, self._newest]) - bound

    def drop_stale(self) -> None:
        """Prune whole paths that are too old by now: no batch could take the tree with them."""
        for i in [i for i in self.finished if self.is_stale(i)]:
            self.finished.remove(i)
            self.outdated.append(i)
            self._prune(i)

    def seed(self, trunk: Sequence[Segment]) -> list[int]:
        """Begin with segments of an earlier tree, see `regrow`. Gives the last segments of paths that could go on."""
        for segment in trunk:
            self._append(segment)
        leaves = leaves_of(tuple(trunk))
        self.finished = [i for i in leaves if trunk[i].stop is not None]
        return [i for i in leaves if trunk[i].stop is None]

    def cut_off(self, active: Collection[int] = ()) -> None:
        """End every path that could go on, as pruned ones are; no rule judged them, so they do not count as such.

        Args:
            active: last segments of paths that are left as they are.
        """
        for i in leaves_of(tuple(self.segments)):
            if self.segments[i].stop is None and i not in active:
                self.segments[i] = replace(self.segments[i], stop=StopReason.PRUNED)

    def affordable(self, parent: int, committed: int) -> int:
        """Runs from `parent` to the limit for which the token budget has room beside `committed` tokens."""
        budget = self.rules.max_tree_tokens
        if budget is None:
            return self.rules.width
        free = budget - sum(len(segment) for segment in self.segments) - committed
        return max(0, free // self.rest(parent))

    def saved_tokens(self) -> int:
        """Tokens that paths which were pruned before their end, or ended by repetition, lack to the mean length of the others."""
        repeated = [i for i in self.finished if self.segments[i].stop is StopReason.REPETITION]
        others = [self.end(i) for i in self.finished if i not in repeated]
        if not others:
            return 0
        mean = sum(others) / len(others)
        cut = [*(i for i in self.pruned if i not in self.outdated), *repeated]
        return round(sum(max(0.0, mean - self.end(i)) for i in cut))

    def num_cut_short(self) -> int:
        """Paths that were pruned or ended by repetition."""
        stops = (self.segments[i].stop for i in self.finished)
        return len(self.pruned) + sum(stop is StopReason.REPETITION for stop in stops)

    def last_level_logprob(self, i: int) -> float:
        """Mean log-prob of the last level of the path that ends in `i`, in nats."""
        level = self.segments[i].level
        parts = [self.segments[k] for k in self.path(i) if self.segments[k].level == level]
        logprobs = np.concatenate([segment.behavior_logprobs for segment in parts])
        return float(np.mean(logprobs, dtype=np.float64))

    def path(self, parent: int) -> tuple[int, ...]:
        """Segment indices from the prompt down to `parent`."""
        return path_of(self.segments, parent)

    def _append(self, segment: Segment) -> None:
        step, parent = segment.policy_version.step, segment.parent
        self._ends.append(self.end(parent) + len(segment))
        self._oldest.append(step if parent == ROOT else min(step, self._oldest[parent]))
        self._newest = max(step, self._newest)
        self.segments.append(segment)

    def _view(self, i: int) -> PartialPath:
        path = [self.segments[k] for k in self.path(i)]
        return PartialPath(
            np.concatenate([segment.token_ids for segment in path]),
            np.concatenate([segment.behavior_logprobs for segment in path]),
        )

    def _passes(self, i: int, views: dict[int, PartialPath], num_before: int) -> bool:
        pruned_now = sum(k in views for k in self.pruned)
        is_last = not self.finished and num_before - pruned_now == 1
        if len(self.pruned) >= self.rules.width or is_last:
            # an end to trees whose paths are all poor, and no tree without a complete path
            return True
        verdict = judge(
            self.prune,
            views[i],
            list(views.values()),
            level=self.segments[i].level,
            level_logprob=self.last_level_logprob(i),
            rng=self.rng,
        )
        if verdict is PRUNE:
            self._prune(i)
        elif verdict.inclusion < 1:
            self.segments[i] = replace(self.segments[i], inclusion=verdict.inclusion)
        return not verdict.is_pruned

    def _prune(self, i: int) -> None:
        self.segments[i] = replace(self.segments[i], stop=StopReason.PRUNED)
        self.pruned.append(i)
        if not self.prune.refill or len(self.pruned) > self.rules.width:
            # the second: an end to trees whose paths are too old again and again
            self.width -= 1
