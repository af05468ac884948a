"""How one tree grows (TreePO, section 2.2 and Algorithm 1): which paths are continued, and how often.

A growth says what to ask of the engine, is told each run that comes back, and says what to ask next, until nothing is
left to ask. There are three kinds:

* barrier: rounds. When all runs of a round are back, the next one is planned from this tree's counts alone;
* eager: a path forks as soon as its own run is back, which favours the paths that are back first;
* independent: `width` whole responses that share the prompt alone: the baseline.

The rules of the first two:

* budget transfer: forks of paths that ended are given to the survivors, up to `width` in all;
* fallback: with no path active and fewer than `width` leaves, ended paths are forked again at a segment boundary;
* run to completion: once finished + active = width no fork can follow, so each path is asked for its rest, unless it is
  to be judged at boundaries. From then on the place of a pruned path goes to a fallback at once.

Where paths are pruned by age, each arrival may also prune paths that are whole: it may hold the token beside which they
are too old. So a tree of nothing but pruned paths is possible, under updates that come faster than its paths end.

A growth may begin with a trunk, what was kept of an earlier tree of the prompt (see `regrow`). Its ended paths count as
finished, its open ends go on with one run each, and the prompt gets the forks that it lacks; then the rules hold as ever.

Invariant: finished + active <= width, and exactly `width` finished paths in the end unless `notes` says why not.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence

from treepo_async.tree import fallback
from treepo_async.tree.cut import Run
from treepo_async.tree.growing import Extension, GrowingTree
from treepo_async.tree.rules import GrowthRules, PruneRules
from treepo_async.tree.split import split_by_score, split_evenly
from treepo_async.types import ROOT, Segment, StopReason

Fork = tuple[int, int]
"""A segment, or `ROOT`, and how many paths go on from it."""


class Growth(ABC):
    """One tree while it grows.

    Attributes:
        tree: what there is of it.
        num_fallbacks: paths that were forked from an ended path.
    """

    def __init__(
        self,
        rules: GrowthRules,
        rng: random.Random,
        prune: PruneRules,
        trunk: tuple[Segment, ...] = (),
    ) -> None:
        self.tree = GrowingTree(rules, prune, rng)
        self._trunk = trunk
        self.rules, self.rng = rules, rng
        self.num_fallbacks = 0
        self._is_saturated = False
        self._is_cut_off = False
        self._entropies: dict[int, float] = {}

    @abstractmethod
    def start(self) -> list[Extension]:
        """What to ask first."""

    @abstractmethod
    def add(
        self,
        extension: Extension,
        run: Run,
        stop: StopReason | None,
        *,
        entropy: float | None = None,
    ) -> list[Extension]:
        """Take one run. Gives what to ask now, in the order in which it should be submitted.

        Args:
            extension: the request it answers.
            run: its tokens up to and including the stop, at least one.
            stop: why the path ended, None if only the request's `max_new_tokens` ended it.
            entropy: of the distribution of its last token, in nats; needed where forks are split by it.
        """

    def cut_off(self) -> int:
        """End every path that has not ended, as a pruned one. Gives the number of whole leaves; nothing may follow."""
        self.tree.drop_stale()
        self.tree.cut_off()
        self._is_cut_off = True
        return len(self.tree.finished)

    def notes(self) -> tuple[str, ...]:
        """What makes the complete tree differ from its rules."""
        num_unfilled = self.rules.width - self.tree.width
        missing = self.tree.room
        reason = "fallback is off" if self.rules.fallback == "none" else "the token budget is spent"
        if self._is_cut_off:
            reason = "cut off at the deadline"
        pruned = (
            "more paths were pruned than the width"
            if self.tree.prune.refill
            else "pruned paths are not refilled"
        )
        notes = [(num_unfilled, pruned), (missing, reason)]
        return tuple(
            f"{number} leaves fewer than the width: {reason}" for number, reason in notes if number
        )

    def _record(
        self, extension: Extension, run: Run, stop: StopReason | None, entropy: float | None
    ) -> int | None:
        """The run's last segment if the path can go on, else None."""
        last = self.tree.record(extension, run, stop)
        if last is not None and entropy is not None:
            self._entropies[last] = entropy
        return last

    def _first_forks(self) -> list[Fork]:
        """How the tree begins."""
        ends = self._seed()
        drawn = self.rng.randint(self.rules.first_fork_min, self.rules.first_fork_max)
        num_there = sum(segment.parent == ROOT for segment in self._trunk)
        return [*self._from_prompt(drawn - num_there, ends), *((i, 1) for i in ends)]

    def _from_prompt(self, wanted: int, ends: Sequence[int] = ()) -> list[Fork]:
        """At most `wanted` paths from the prompt, beside those that go on from `ends`."""
        committed = sum(map(self.tree.rest, ends))
        # a tree may not end without a single complete path
        least = 0 if self.tree.finished or ends else 1
        most = max(least, self.tree.affordable(ROOT, committed))
        number = min(wanted, self.tree.room - len(ends), most)
        return [(ROOT, number)] if number > 0 else []

    def _seed(self) -> list[int]:
        """Begin with the trunk. Gives the open ends that go on; the others are cut off."""
        tree = self.tree
        ends, active, committed = tree.seed(self._trunk), list[int](), 0
        for i in self.rng.sample(ends, min(len(ends), max(0, tree.room))):
            if tree.affordable(i, committed) > 0 or not (tree.finished or active):
                active.append(i)
                committed += tree.rest(i)
        tree.cut_off(active)
        # these were judged, and went on
        judged = [i for i in active if tree.segments[i].inclusion < 1]
        others = [i for i in sorted(active) if i not in judged]
        return sorted([*judged, *tree.without_pruned(others, len(judged))])

    def _extensions(self, forks: Sequence[Fork], num_active: int) -> list[Extension]:
        """Requests for these forks, with `num_active` paths active beside them."""
        self._is_saturated |= num_active + sum(n for _, n in forks) == self.tree.room
        whole = self._is_saturated and not self.tree.prune.judges
        return [self.tree.extension(parent, n, to_completion=whole) for parent, n in forks]

    def _fall_back(self, missing: int, committed: int) -> list[Fork]:
        """Up to `missing` paths from paths that ended by EOS or box; from the prompt if there are none."""
        if missing == 0 or self.rules.fallback == "none":
            return []
        tree, forks = self.tree, list[Fork]()
        for leaf in fallback.candidates(tree.segments, tree.finished, self.rng):
            parent = fallback.boundary(self.rules.fallback, tree.segments, leaf, self.rng)
            if tree.is_stale(parent):
                parent = ROOT
            # a tree may not end without a single complete path
            least = 0 if tree.finished or forks or committed else 1
            most = max(least, tree.affordable(parent, committed))
            num_runs = min(self.rules.branching_factor, missing, most)
            if num_runs > 0:
                forks.append((parent, num_runs))
                missing -= num_runs
                committed += num_runs * tree.rest(parent)
        self.num_fallbacks += sum(n for _, n in forks)
        return forks


class BarrierGrowth(Growth):
    """Rounds with a barrier; the tree does not depend on the order in which runs come back."""

    def start(self) -> list[Extension]:
        """See `Growth`."""
        return self._begin(self._first_forks() or self._fall_back(self.tree.room, 0))

    def add(
        self,
        extension: Extension,
        run: Run,
        stop: StopReason | None,
        *,
        entropy: float | None = None,
    ) -> list[Extension]:
        """See `Growth`."""
        self._arrived.setdefault(extension.number, []).append((run, stop, entropy))
        if sum(map(len, self._arrived.values())) < sum(e.num_runs for e in self._round):
            return []
        lasts = self._lasts()
        survivors = [last for last in lasts if last is not None]
        num_ended = len(lasts) - len(survivors)
        left = self.tree.without_pruned(survivors)
        return self._begin(self._next(left, num_ended + len(survivors) - len(left)))

    def cut_off(self) -> int:
        """See `Growth`; what has arrived of the round counts."""
        self._lasts()
        return super().cut_off()

    def _lasts(self) -> list[int | None]:
        """Record what has arrived of the round: the last segment of each run, None where its path has ended."""
        return [
            self._record(asked, *arrival)
            for asked in self._round
            for arrival in self._arrived.get(asked.number, ())
        ]

    def _begin(self, forks: Sequence[Fork]) -> list[Extension]:
        self._round = self._extensions(forks, num_active=0)
        self._arrived: dict[int, list[tuple[Run, StopReason | None, float | None]]] = {}
        return self._round

    def _next(self, survivors: list[int], num_ended: int) -> list[Fork]:
        """The next round, from the paths that survived this one and the number of those that did not."""
        num_active, room = len(survivors), self.tree.room
        committed = sum(self.tree.rest(i) for i in survivors)
        if not survivors:
            return self._fall_back(room, committed)
        if self._is_saturated:
            return [*((i, 1) for i in survivors), *self._fall_back(room - num_active, committed)]
        wanted = min(room, self.rules.branching_factor * (num_ended + num_active))
        extra = self.tree.affordable(min(survivors, key=self.tree.end), committed)
        budget = max(num_active, min(wanted, num_active + extra))
        return list(zip(survivors, self._split(budget, survivors), strict=True))

    def _split(self, budget: int, survivors: list[int]) -> list[int]:
        rule = self.rules.split
        if rule == "even" or budget == len(survivors):
            return split_evenly(budget, len(survivors), self.rng)
        scores = [
            self._entropies[i] if rule == "entropy" else self.tree.last_level_logprob(i)
            for i in survivors
        ]
        return split_by_score(budget, scores, rule, self.rules.split_temperature, self.rng)


class IndependentGrowth(BarrierGrowth):
    """Whole responses from the prompt."""

    def start(self) -> list[Extension]:
        """See `Growth`."""
        ends = self._seed()
        return self._begin([*self._from_prompt(self.tree.room, ends), *((i, 1) for i in ends)])

    def _begin(self, forks: Sequence[Fork]) -> list[Extension]:
        self._arrived = {}
        self._round = [self.tree.extension(i, n, to_completion=True) for i, n in forks]
        return self._round

    def _next(self, survivors: list[int], num_ended: int) -> list[Fork]:
        return self._from_prompt(self.tree.room)


class EagerGrowth(Growth):
    """No barrier: every run that is back is followed up at once."""

    def start(self) -> list[Extension]:
        """See `Growth`."""
        self._active: list[Extension] = []
        forks = self._first_forks() or self._fall_back(self.tree.room, 0)
        return self._begin([(i, 1) for i, n in forks for _ in range(n)])

    def add(
        self,
        extension: Extension,
        run: Run,
        stop: StopReason | None,
        *,
        entropy: float | None = None,
    ) -> list[Extension]:
        """See `Growth`."""
        self._active.remove(extension)
        last = self._record(extension, run, stop, entropy)
        survivors = self.tree.without_pruned([] if last is None else [last], len(self._active))
        return self._begin(self._next(survivors))

    def _begin(self, forks: Sequence[Fork]) -> list[Extension]:
        extensions = self._extensions(forks, num_active=len(self._active))
        self._active += extensions
        return extensions

    def _next(self, survivors: list[int]) -> list[Fork]:
        free = self.tree.room - len(self._active)
        committed = sum(self.tree.rest(extension.parent) for extension in self._active)
        if survivors:
            (path,) = survivors
            wanted = 1 if self._is_saturated else self.rules.branching_factor
            affordable = self.tree.affordable(path, committed)
            return [(path, 1)] * max(1, min(wanted, free, affordable))
        if self._is_saturated or not self._active:
            return [(p, 1) for p, n in self._fall_back(free, committed) for _ in range(n)]
        return []


def start_growth(
    rules: GrowthRules,
    rng: random.Random,
    prune: PruneRules | None = None,
    trunk: tuple[Segment, ...] = (),
) -> Growth:
    """The growth that `rules.growth` names, not started.

    Args:
        rules: the tree's shape.
        rng: decides forks, fallbacks and prunes.
        prune: which paths end early.
        trunk: what the tree begins with; it must fit the rules, see `regrow.fits`.
    """
    kinds: dict[str, type[Growth]] = {
        "barrier": BarrierGrowth,
        "eager": EagerGrowth,
        "independent": IndependentGrowth,
    }
    return kinds[rules.growth](rules, rng, prune or PruneRules(), trunk)
