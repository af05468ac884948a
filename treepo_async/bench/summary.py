"""From the samples of a cell to its figures: medians over pairs, and how much of the possible speed-up was reached.

Speed-ups are ratios of the two arms of one pair, which ran one after the other on the same engine; only then are
medians taken. So a neighbour that slows the machine for a while slows both arms of a pair.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from treepo_async.bench.cells import Arm, Cell
from treepo_async.bench.samples import Sample


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over all pairs."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Of at least one value."""
        ascending = sorted(values)
        return cls(statistics.median(ascending), ascending[0], ascending[-1])


FIGURES = (
    "wall_s",
    "engine_cpu_s",
    "trajectories",
    "requests",
    "decoded_tokens",
    "delivered_tokens",
    "prefix_tokens",
    "cached_tokens",
    "computed_tokens",
    "decoded_per_delivered",
    "mean_delivered_tokens",
    "trajectories_per_s",
    "tokens_per_s",
    "processed_tokens_per_s",
    "decoded_tokens_per_s",
)
"""What is given for both arms; names of `Sample`."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A cell."""

    cell: Cell
    pairs: int
    arms: dict[Arm, dict[str, Spread]]
    """By name of the figure."""
    speed_up: Spread
    """Wall time of independent sampling over that of trees."""
    cpu_speed_up: Spread
    """The same of the engine's processor time."""
    token_gain: Spread
    """Tokens/s of trees over those of independent sampling, prefixes from the cache counted as work."""
    limit: float
    """Speed-up if time were decoded tokens alone: delivered over decoded tokens of trees."""
    child_cached_share: float | None
    """Of all pairs together."""

    @property
    def share_of_limit(self) -> float:
        """How much of the limit was reached."""
        return self.speed_up.median / self.limit

    def tree(self, figure: str) -> Spread:
        """A figure of trees."""
        return self.arms[Arm.TREE][figure]

    def independent(self, figure: str) -> Spread:
        """The same figure of independent sampling."""
        return self.arms[Arm.INDEPENDENT][figure]


def cells_of(samples: Iterable[Sample]) -> list[Cell]:
    """The cells with at least one whole pair, in the order in which they were measured first."""
    samples = list(samples)
    cells = dict.fromkeys(sample.cell for sample in samples)
    return [cell for cell in cells if pairs_of(samples, cell)]


def pairs_of(samples: Iterable[Sample], cell: Cell) -> list[tuple[Sample, Sample]]:
    """Tree and independent sample of each whole pair of a cell, by number of the pair."""
    by_pair: dict[int, dict[Arm, Sample]] = {}
    for sample in samples:
        if sample.cell == cell:
            by_pair.setdefault(sample.pair, {})[sample.arm] = sample
    return [
        (arms[Arm.TREE], arms[Arm.INDEPENDENT])
        for _, arms in sorted(by_pair.items())
        if len(arms) == len(Arm)
    ]


def summarize(pairs: Sequence[tuple[Sample, Sample]]) -> Summary:
    """Sum up a cell.

    Args:
        pairs: tree and independent sample, at least one pair, all of one cell.
    """
    trees = [tree for tree, _ in pairs]
    servable = sum(tree.child_servable_tokens for tree in trees)
    cached = sum(tree.child_cached_tokens for tree in trees)
    decoded = sum(tree.decoded_tokens for tree in trees)
    return Summary(
        cell=trees[0].cell,
        pairs=len(pairs),
        arms={arm: _figures([s for pair in pairs for s in pair if s.arm is arm]) for arm in Arm},
        speed_up=_ratio(pairs, lambda tree, independent: independent.wall_s / tree.wall_s),
        cpu_speed_up=_ratio(
            pairs, lambda t, independent: independent.engine_cpu_s / t.engine_cpu_s
        ),
        token_gain=_ratio(pairs, lambda t, independent: t.tokens_per_s / independent.tokens_per_s),
        limit=sum(tree.delivered_tokens for tree in trees) / decoded,
        child_cached_share=cached / servable if servable else None,
    )


def _figures(samples: Sequence[Sample]) -> dict[str, Spread]:
    return {name: Spread.of(getattr(sample, name) for sample in samples) for name in FIGURES}


def _ratio(
    pairs: Sequence[tuple[Sample, Sample]], ratio: Callable[[Sample, Sample], float]
) -> Spread:
    return Spread.of(ratio(tree, independent) for tree, independent in pairs)
