"""A sweep over the learner in words: the console's lines, `cells.csv` and `table.md`.

Time ratios are taken round by round, and then the median: what slows the machine for a while slows all ways of a round.
"""

import csv
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.bench.learner_cells import CELL_FIELDS, LearnerCell, Way, row_of
from treepo_async.bench.learner_samples import LearnerSample, rounds_of
from treepo_async.bench.markdown import markdown
from treepo_async.bench.summary import Spread

Round = Mapping[Way, LearnerSample]


@dataclass(frozen=True, slots=True)
class LearnerSummary:
    """A cell."""

    cell: LearnerCell
    rounds: Sequence[Round]

    def sample(self, way: Way) -> LearnerSample:
        """What is the same in every round."""
        return self.rounds[0][way]

    def seconds(self, way: Way) -> float:
        """Median wall time."""
        return statistics.median(found[way].wall_s for found in self.rounds)

    def ratio(self, slow: Way, fast: Way, clock: str = "wall_s") -> Spread:
        """Time of one way over that of another."""
        return Spread.of(getattr(r[slow], clock) / getattr(r[fast], clock) for r in self.rounds)

    @property
    def has_padded(self) -> bool:
        """Whether trajectories differ in length."""
        return Way.PADDED in self.rounds[0]

    @property
    def token_ratio(self) -> float:
        """Of flat packing to tree packing, as the trees are cut."""
        return self.sample(Way.FLAT).tokens / self.sample(Way.TREE).tokens

    @property
    def flop_ratio(self) -> float:
        """Of flat packing to tree packing of whole trees: the time ratio to be had at best."""
        return self.sample(Way.FLAT).flops / self.sample(Way.TREE).whole_flops

    @property
    def share_of_flop_ratio(self) -> float:
        """How much of that was reached."""
        return self.ratio(Way.FLAT, Way.TREE).median / self.flop_ratio

    def tokens_per_s(self, way: Way) -> float:
        """Tokens of trajectories, prompts included, that are trained a second: the same numerator for every way."""
        return self.sample(Way.FLAT).tokens / self.seconds(way)

    def flops_per_s(self, way: Way) -> float:
        """FLOPs that the way needs, by the cost model, over its time."""
        return self.sample(way).flops / self.seconds(way)

    @property
    def expected_ratio(self) -> float:
        """Time ratio by the cost model."""
        return self.sample(Way.FLAT).expected_s / self.sample(Way.TREE).expected_s

    @property
    def choice(self) -> Way:
        """What the cost model takes."""
        return Way(self.sample(Way.TREE).choice)

    @property
    def memory_ratio(self) -> float:
        """Peak memory of flat packing over that of tree packing."""
        return self.sample(Way.FLAT).peak_bytes / max(self.sample(Way.TREE).peak_bytes, 1)

    @property
    def gradient_gap(self) -> float:
        """Largest difference of a tensor's gradient between tree and flat packing, relative to its norm."""
        return self.sample(Way.TREE).gradient_gap


def cells_of(samples: Iterable[LearnerSample]) -> list[LearnerSummary]:
    """All cells, in the order in which they were measured first."""
    samples = list(samples)
    cells = dict.fromkeys(sample.cell for sample in samples)
    return [LearnerSummary(cell, rounds_of(samples, cell)) for cell in cells]


def round_line(found: Round) -> str:
    """What a round gave."""
    order = sorted(found, key=lambda way: found[way].place)
    times = "  ".join(f"{way} {found[way].wall_s:.3f} s" for way in order)
    ratio = found[Way.FLAT].wall_s / found[Way.TREE].wall_s
    return f"  round {found[Way.TREE].round}  {times}  flat/tree {ratio:.2f}"


def cell_line(summary: LearnerSummary) -> str:
    """What a cell gave."""
    ratio = summary.ratio(Way.FLAT, Way.TREE)
    return (
        f"  flat/tree {ratio.median:.2f} ({_range(ratio)}) of {summary.flop_ratio:.2f} by FLOPs: "
        f"{summary.share_of_flop_ratio:.0%}  tokens {summary.token_ratio:.2f}  "
        f"takes {summary.choice}: {_of_flat(summary)} of flat's time"
    )


_TABLE: dict[str, Callable[[LearnerSummary], str]] = {
    "trees": lambda s: str(s.cell),
    "trajectories": lambda s: f"{s.sample(Way.TREE).trajectories}",
    "tokens, flat / tree": lambda s: (
        f"{s.sample(Way.FLAT).tokens:,} / {s.sample(Way.TREE).tokens:,}"
    ),
    "FLOP ratio": lambda s: f"{s.flop_ratio:.2f}",
    "**time ratio**": lambda s: (
        f"**{s.ratio(Way.FLAT, Way.TREE).median:.2f}** ({_range(s.ratio(Way.FLAT, Way.TREE))})"
    ),
    "by processor time": lambda s: f"{s.ratio(Way.FLAT, Way.TREE, 'cpu_s').median:.2f}",
    "of the FLOP ratio": lambda s: f"{s.share_of_flop_ratio:.0%}",
    "expected": lambda s: f"{s.expected_ratio:.2f}",
    "padded / tree": lambda s: (
        f"{s.ratio(Way.PADDED, Way.TREE).median:.2f}" if s.has_padded else "as flat"
    ),
    "seconds, flat / tree": lambda s: f"{s.seconds(Way.FLAT):.2f} / {s.seconds(Way.TREE):.2f}",
    "trajectory tokens/s, flat / tree": lambda s: (
        f"{s.tokens_per_s(Way.FLAT):,.0f} / {s.tokens_per_s(Way.TREE):,.0f}"
    ),
    "TFLOP/s, flat / tree": lambda s: (
        f"{s.flops_per_s(Way.FLAT) / 1e12:.3g} / {s.flops_per_s(Way.TREE) / 1e12:.3g}"
    ),
    "peak MiB, flat / tree": lambda s: f"{_mib(s, Way.FLAT)} / {_mib(s, Way.TREE)}",
    "taken": lambda s: f"{s.choice}",
    "its time of flat's": lambda s: _of_flat(s),
}
"""Column: how to fill it."""

_FIGURES: dict[str, Callable[[LearnerSummary], object]] = {
    "rounds": lambda s: len(s.rounds),
    "flat_tokens": lambda s: s.sample(Way.FLAT).tokens,
    "tree_tokens": lambda s: s.sample(Way.TREE).tokens,
    "token_ratio": lambda s: s.token_ratio,
    "flop_ratio": lambda s: s.flop_ratio,
    "time_ratio": lambda s: s.ratio(Way.FLAT, Way.TREE).median,
    "time_ratio_low": lambda s: s.ratio(Way.FLAT, Way.TREE).low,
    "time_ratio_high": lambda s: s.ratio(Way.FLAT, Way.TREE).high,
    "cpu_time_ratio": lambda s: s.ratio(Way.FLAT, Way.TREE, "cpu_s").median,
    "share_of_flop_ratio": lambda s: s.share_of_flop_ratio,
    "expected_ratio": lambda s: s.expected_ratio,
    "padded_time_ratio": lambda s: s.ratio(Way.PADDED, Way.TREE).median if s.has_padded else "",
    "flat_s": lambda s: s.seconds(Way.FLAT),
    "tree_s": lambda s: s.seconds(Way.TREE),
    "flat_tokens_per_s": lambda s: s.tokens_per_s(Way.FLAT),
    "tree_tokens_per_s": lambda s: s.tokens_per_s(Way.TREE),
    "flat_flops_per_s": lambda s: s.flops_per_s(Way.FLAT),
    "tree_flops_per_s": lambda s: s.flops_per_s(Way.TREE),
    "flat_peak_bytes": lambda s: s.sample(Way.FLAT).peak_bytes,
    "tree_peak_bytes": lambda s: s.sample(Way.TREE).peak_bytes,
    "choice": lambda s: s.choice,
    "choice_time_of_flat": lambda s: _of_flat(s),
    "gradient_gap": lambda s: s.gradient_gap,
}


def write_cells(file: Path, summaries: Sequence[LearnerSummary]) -> None:
    """Write `cells.csv`: one row for each cell."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, (*CELL_FIELDS, *_FIGURES), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**row_of(s.cell), **{name: figure(s) for name, figure in _FIGURES.items()}}
            for s in summaries
        )


def write_table(file: Path, summaries: Sequence[LearnerSummary]) -> None:
    """Write `table.md`, one table for each model and way of computing it."""
    setups = dict.fromkeys(setup(summary.cell) for summary in summaries)
    parts = [
        f"{name}:\n\n{table([s for s in summaries if setup(s.cell) == name])}" for name in setups
    ]
    notes = (
        "Forward and backward, without the optimizer. Medians over rounds, (least - most). Ratios are of flat packing to tree "
        "packing unless others are named; the FLOP ratio is of whole trees, as if none had been cut to fit a microbatch."
    )
    file.write_text("\n\n".join([*parts, notes]) + "\n")


def table(summaries: Sequence[LearnerSummary]) -> str:
    """Cells as rows."""
    return markdown(_TABLE, ([fill(summary) for fill in _TABLE.values()] for summary in summaries))


def setup(cell: LearnerCell) -> str:
    """What is the same for all cells of a sweep."""
    return (
        f"{cell.shape}, {cell.dtype}, {cell.attention} attention, recompute={cell.recompute}, {cell.prompts} trees, "
        f"microbatches of {cell.budget} tokens"
    )


def _of_flat(summary: LearnerSummary) -> str:
    return f"{summary.ratio(summary.choice, Way.FLAT).median:.2f}"


def _mib(summary: LearnerSummary, way: Way) -> str:
    return f"{summary.sample(way).peak_bytes / 2**20:,.0f}"


def _range(spread: Spread) -> str:
    return f"{spread.low:.2f} - {spread.high:.2f}"
