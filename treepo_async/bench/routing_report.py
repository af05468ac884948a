"""What `bench.py routing` found: rows of `samples.csv`, lines of the console, and `table.md`."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Self

from treepo_async.bench.routing_cells import NUM_UPDATES, PolicyName, RoutingCell, Update
from treepo_async.bench.rows import append_rows
from treepo_async.types import Provenance


@dataclass(frozen=True, slots=True)
class RoutingSample:
    """One measurement."""

    policy: PolicyName
    update: Update
    round: int
    trees: int
    children: int
    """Runs that continued a segment."""
    spilled: int
    """Those that left the engine which had the segment, as it had too much to do ..."""
    migrated: int
    """... and as it let nothing in."""
    moved_tokens: int
    """Prefix tokens computed again for these."""
    refilled_tokens: int
    """Prefix tokens computed again where they had been, under other weights."""
    prefix_tokens: int
    cached_tokens: int
    decoded_tokens: int
    load_max_over_mean: float
    """Of the tokens that the engines decoded."""
    wall_s: float

    @classmethod
    def of(
        cls,
        cell: RoutingCell,
        costs: Sequence[Provenance],
        decoded: Sequence[int],
        wall_s: float,
    ) -> Self:
        """Add up.

        Args:
            cell: what was measured.
            costs: of each tree.
            decoded: tokens of each engine.
            wall_s: of all.
        """
        return cls(
            cell.policy,
            cell.update,
            cell.round,
            trees=len(costs),
            children=sum(c.num_children for c in costs),
            spilled=sum(c.num_spilled for c in costs),
            migrated=sum(c.num_migrated for c in costs),
            moved_tokens=sum(c.moved_tokens for c in costs),
            refilled_tokens=sum(c.refilled_tokens for c in costs),
            prefix_tokens=sum(c.prefix_tokens for c in costs),
            cached_tokens=sum(c.cached_tokens for c in costs),
            decoded_tokens=sum(c.decoded_tokens for c in costs),
            load_max_over_mean=max(decoded) / fmean(decoded),
            wall_s=wall_s,
        )

    @property
    def at_home(self) -> float:
        """Share of children that went on at their parent's engine."""
        return 1 - (self.spilled + self.migrated) / self.children

    @property
    def cached(self) -> float:
        """Share of prefix tokens that came from a cache."""
        return self.cached_tokens / self.prefix_tokens

    @property
    def refilled_per_update(self) -> float:
        """Prefix tokens computed again at one update, at home or on the way elsewhere."""
        return 0.0 if self.update is Update.NONE else self.refilled_tokens / NUM_UPDATES

    @property
    def tokens_per_s(self) -> float:
        """Decoded."""
        return self.decoded_tokens / self.wall_s


COLUMNS = tuple(field.name for field in fields(RoutingSample))


def append(file: Path, samples: Iterable[RoutingSample]) -> None:
    """Add rows to `samples.csv`."""
    append_rows(file, COLUMNS, map(asdict, samples))


def line(sample: RoutingSample) -> str:
    """What a measurement gave."""
    return (
        f"  round {sample.round}  {sample.update:<8} {sample.policy:<12} at home {sample.at_home:.1%}  "
        f"load max/mean {sample.load_max_over_mean:.2f}  prefix from the cache {sample.cached:.1%}  "
        f"spilled {sample.spilled}  migrated {sample.migrated}  moved {sample.moved_tokens:,}  refilled/update {sample.refilled_per_update:,.0f}  "
        f"tokens/s {sample.tokens_per_s:,.0f}"
    )


def table(samples: Sequence[RoutingSample]) -> str:
    """A row for each kind of update and policy: medians over rounds, of the load also the largest."""
    head = (
        "updates",
        "policy",
        "children at home",
        "load max/mean (largest)",
        "prefix from the cache",
        "moved prefix tokens",
        "prefix tokens computed again per update",
        "decoded tokens/s",
    )
    lines = [head, ("---",) * len(head)]
    for update, policy in dict.fromkeys((s.update, s.policy) for s in samples):
        found = [s for s in samples if (s.update, s.policy) == (update, policy)]
        loads = [s.load_max_over_mean for s in found]
        lines.append(
            (
                str(update),
                str(policy),
                f"{median(s.at_home for s in found):.1%}",
                f"{median(loads):.2f} ({max(loads):.2f})",
                f"{median(s.cached for s in found):.1%}",
                f"{median(s.moved_tokens for s in found):,.0f}",
                f"{median(s.refilled_per_update for s in found):,.0f}",
                f"{median(s.tokens_per_s for s in found):,.0f}",
            )
        )
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
