"""The queue's benchmark in words: lines of the console, and `table.md`.

Ratios are taken round by round, and then the median: what slows the machine for a while slows all arms of a round.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from treepo_async.bench.markdown import markdown
from treepo_async.bench.queue_replay import Arm
from treepo_async.bench.queue_samples import Burst, Crowd, Latency, Memory
from treepo_async.bench.summary import Spread

Round = Mapping[Arm, Burst]


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """All rounds of one size of tree."""

    rounds: Sequence[Round]

    @property
    def tokens(self) -> int:
        """Of a tree."""
        return self.rounds[0][Arm.BARE].tokens

    def rate(self, arm: Arm) -> Spread:
        """Trees/s."""
        return Spread.of(found[arm].trees_per_s for found in self.rounds)

    def ratio(self, arm: Arm, to: Arm) -> Spread:
        """Of rates."""
        return Spread.of(found[arm].trees_per_s / found[to].trees_per_s for found in self.rounds)

    def median(self, arm: Arm, figure: str) -> float:
        """Of a figure of a burst."""
        return Spread.of(getattr(found[arm], figure) for found in self.rounds).median

    def processor_us(self, arm: Arm) -> float:
        """Of the replay process for a tree, the median."""
        bursts = [found[arm] for found in self.rounds]
        return Spread.of(1e6 * burst.replay_cpu_s / burst.trees for burst in bursts).median


def summaries_of(bursts: Iterable[Burst]) -> list[QueueSummary]:
    """One for each size of tree."""
    by_tokens = groupby(sorted(bursts, key=lambda b: (-b.tokens, b.round)), lambda b: b.tokens)
    return [
        QueueSummary([{b.arm: b for b in found} for _, found in groupby(group, lambda b: b.round)])
        for _, group in by_tokens
    ]


def round_line(bursts: Iterable[Burst]) -> str:
    """What a round gave."""
    rates = "  ".join(f"{burst.arm} {burst.trees_per_s:,.0f}" for burst in bursts)
    return f"  trees/s: {rates}"


def latency_line(found: Latency) -> str:
    """What latency was."""
    return (
        f"  {found.tokens:,} tokens, {found.rate:,.0f} trees/s: to the acknowledgement "
        f"p50 {_ms(found.p50_s)}, p99 {_ms(found.p99_s)}, at most {_ms(found.longest_s)}"
    )


def crowd_line(found: Crowd) -> str:
    """What many actors got."""
    return (
        f"  {found.actors} actors: {found.trees_per_s:,.0f} trees/s of {found.tokens:,} tokens, each actor {found.least_trees} to "
        f"{found.most_trees} trees, p50 {_ms(found.p50_s)}, p99 {_ms(found.p99_s)}, "
        f"{_mib(found.rss_bytes)} MiB resident"
    )


def memory_line(found: Memory) -> str:
    """A look at the memory."""
    return (
        f"  {found.trees:>9,} trees  {found.seconds:>6.0f} s  {_mib(found.rss_bytes)} MiB resident  "
        f"{_mib(found.own_bytes)} MiB its own  {_mib(found.disk_bytes)} MiB on disk  {found.files} open files"
    )


_TABLE: dict[str, Callable[[QueueSummary], str]] = {
    "tokens": lambda s: f"{s.tokens:,}",
    "bare": lambda s: _rate(s, Arm.BARE),
    "wire": lambda s: _rate(s, Arm.WIRE),
    "**wire / bare**": lambda s: f"**{_spread(s.ratio(Arm.WIRE, Arm.BARE))}**",
    "durable": lambda s: _rate(s, Arm.DURABLE),
    "single": lambda s: _rate(s, Arm.SINGLE),
    "**durable / single**": lambda s: f"**{_spread(s.ratio(Arm.DURABLE, Arm.SINGLE))}**",
    "durable / wire": lambda s: _spread(s.ratio(Arm.DURABLE, Arm.WIRE)),
    "durable, MB/s": lambda s: f"{s.median(Arm.DURABLE, 'mb_per_s'):,.0f}",
    "bytes a token, wire": lambda s: f"{s.median(Arm.DURABLE, 'wire_bytes_per_token'):.2f}",
    "on disk": lambda s: f"{s.median(Arm.DURABLE, 'disk_bytes_per_token'):.2f}",
    "processor time of replay a tree, bare / wire / durable": lambda s: (
        " / ".join(f"{s.processor_us(arm):,.0f}" for arm in (Arm.BARE, Arm.WIRE, Arm.DURABLE))
        + " µs"
    ),
}
"""Column: how to fill it."""


def write_table(
    file: Path,
    summaries: Sequence[QueueSummary],
    latencies: Sequence[Latency],
    crowds: Sequence[Crowd],
) -> None:
    """Write `table.md`."""
    notes = "Trees/s, medians over rounds, (least - most); ratios are of the two bursts of a round."
    lines = [*map(latency_line, latencies), *map(crowd_line, crowds)]
    items = [f"* {line.strip()}" for line in lines]
    file.write_text("\n\n".join([table(summaries), notes, "\n".join(items)]).strip() + "\n")


def table(summaries: Sequence[QueueSummary]) -> str:
    """Sizes as rows."""
    return markdown(_TABLE, ([fill(summary) for fill in _TABLE.values()] for summary in summaries))


def _rate(summary: QueueSummary, arm: Arm) -> str:
    return f"{summary.rate(arm).median:,.0f}"


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} - {spread.high:.2f})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.0f}"
