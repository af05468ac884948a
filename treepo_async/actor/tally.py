"""What a stand-alone actor has done so far, in numbers, and as lines for a person."""

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from treepo_async.metrics.lengths import LengthSums
from treepo_async.scoring.failures import Failure, counts_text
from treepo_async.tree.path_weights import leaf_weights
from treepo_async.types import StopReason, Tree

WINDOW_S = 60.0
"""Rates are means over so long."""


class _Mark(NamedTuple):
    """Where the counts stood at a time."""

    seconds: float
    trees: int
    decoded: int
    delivered: int


@dataclass
class Tally:
    """Counts of prompts over all starts of a job, and of tokens, rewards and stops in this one."""

    total: int
    """Prompts of the job."""
    clock: Callable[[], float]
    done: int = 0
    skipped: int = 0
    failed: int = 0
    trees: int = 0
    """Grown in this start."""
    costs: Counter[str] = field(default_factory=Counter)
    """Tokens decoded, wasted, saved, cached, and of prefixes; requests."""
    stops: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    """Attempts that failed."""
    restarts: int = 0
    """Of the engine."""
    failures: Mapping[Failure, int] = field(default_factory=dict)
    """Why responses have no score."""
    lengths: LengthSums = field(default_factory=LengthSums)
    """Of trajectories that were not pruned."""
    _rewards: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Sums of rewards and accuracies of those that were scored."""
    _scored: int = 0
    _began: float = field(init=False)
    _ended: float | None = None
    _marks: deque[_Mark] = field(init=False)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Growing begins now: rates count from here."""
        self._began = self.clock()
        self._marks = deque([_Mark(self._began, 0, 0, 0)])

    def end(self) -> None:
        """Growing has ended: what comes now takes time for other things."""
        self._ended = self.clock()

    def add(self, tree: Tree) -> None:
        """A prompt has its tree."""
        self.done += 1
        self.trees += 1
        cost = tree.provenance
        self.costs.update(
            decoded=cost.decoded_tokens,
            wasted=cost.wasted_tokens,
            cached=cost.cached_tokens,
            prefix=cost.prefix_tokens,
            saved=cost.saved_tokens,
            requests=cost.num_requests,
        )
        self.lengths += _lengths(tree)
        self.stops.update(str(tree.segments[leaf].stop) for leaf in tree.leaves)
        scored_L = np.isfinite(tree.rewards_L) & tree.is_whole_L
        self._scored += int(scored_L.sum())
        self._rewards[0] += float(tree.rewards_L[scored_L].sum())
        self._rewards[1] += float(tree.accuracies_L[scored_L].sum())

    @property
    def ended(self) -> int:
        """Prompts to which nothing more happens."""
        return self.done + self.skipped + self.failed

    def line(self) -> str:
        """Where the work stands, in one line."""
        trees, decoded, delivered = self._rates()
        left = "-" if trees <= 0 else duration((self.total - self.ended) / trees)
        return "  ".join(
            [
                f"{self.ended}/{self.total} prompts",
                f"{trees:.2f} trees/s",
                f"decoded {decoded:.0f} tokens/s",
                f"delivered {delivered:.0f} tokens/s",
                f"cached {_share(self.costs['cached'], self.costs['prefix'])}",
                f"left {left}",
                f"skipped {self.skipped}  failed {self.failed}  errors {self.errors}",
            ]
        )

    def summary(self) -> list[str]:
        """All of it, a line for each thing."""
        costs, seconds = self.costs, (self._ended or self.clock()) - self._began
        delivered, trajectories = self.lengths.tokens, self.lengths.trajectories
        ratio = _ratio(costs["decoded"], delivered)
        reward, accuracy = (_ratio(total, self._scored, "+.3f") for total in self._rewards)
        prompts = f"{self.done} done, {self.skipped} skipped, {self.failed} failed of {self.total}"
        rows = [("prompts", prompts)]
        if self.trees:
            rows += [
                ("grown now", f"{self.trees} trees, {trajectories} trajectories, {costs['requests']} requests"),
                ("tokens", f"{costs['decoded']} decoded / {delivered} delivered = {ratio}, {costs['wasted']} cut off"),
                ("length", self._length()),
                ("cache", f"{_share(costs['cached'], costs['prefix'])} of prefix tokens"),
                ("reward", f"mean {reward}, accuracy {accuracy.removeprefix('+')}, errors {counts_text(self.failures)}"),
                ("stops", ", ".join(f"{stop} {number}" for stop, number in self.stops.most_common())),
                ("pruned", str(self.stops[StopReason.PRUNED])),
            ]  # fmt: skip
        if costs["saved"]:
            rows.append(
                ("saved", f"{costs['saved']} tokens by pruning and repetition stops, estimated")
            )
        if self.trees or self.errors or self.restarts:
            rows += [
                ("errors", f"{self.errors} attempts failed, {self.restarts} engine restarts"),
                ("time", f"{duration(seconds)}, {_ratio(self.trees, seconds)} trees/s, without the engine's start and stop"),
            ]  # fmt: skip
        return [f"  {name:<10} {text}" for name, text in rows]

    def _length(self) -> str:
        """The mean, and where trees make it another one, that of independent samples."""
        lengths = self.lengths
        if lengths.delivered is None or lengths.unbiased is None:
            return "-"
        text = f"{lengths.delivered:.1f} tokens of a trajectory, mean"
        unbiased = f"{lengths.unbiased:.1f}"
        if unbiased == f"{lengths.delivered:.1f}":
            return text
        bias = lengths.delivered / lengths.unbiased - 1
        return f"{text}; unbiased {unbiased}, trees make it {bias:+.0%}"

    def _rates(self) -> Sequence[float]:
        """Trees, decoded and delivered tokens a second, lately."""
        now = _Mark(self.clock(), self.trees, self.costs["decoded"], self.lengths.tokens)
        self._marks.append(now)
        while len(self._marks) > 2 and now.seconds - self._marks[1].seconds > WINDOW_S:
            self._marks.popleft()
        then = self._marks[0]
        seconds = max(now.seconds - then.seconds, 1e-9)
        return [(b - a) / seconds for a, b in zip(then[1:], now[1:], strict=True)]


def _lengths(tree: Tree) -> LengthSums:
    is_whole_L = tree.is_whole_L
    weights_L = leaf_weights(tree, "unbiased")[is_whole_L]
    return LengthSums(
        tree.num_delivered_tokens,
        int(is_whole_L.sum()),
        float(weights_L @ tree.num_tokens_L[is_whole_L]),
        float(weights_L.sum()),
    )


def duration(seconds: float) -> str:
    """Seconds for a person: 8 s, 3 min 5 s, 2 h 1 min."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _ratio(part: float, whole: float, form: str = ".2f") -> str:
    return format(part / whole, form) if whole else "-"


def _share(part: float, whole: float) -> str:
    return _ratio(part, whole, ".0%")
