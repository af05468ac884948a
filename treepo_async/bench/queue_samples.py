"""What the queue's benchmark measures: the rows of its CSV files."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from treepo_async.bench.queue_replay import Arm
from treepo_async.bench.rows import append_rows


@dataclass(frozen=True, slots=True)
class Burst:
    """Trees delivered at once."""

    arm: Arm
    tokens: int
    """Unique ones of a tree."""
    segments: int
    window: int
    peers: int
    round: int
    place: int
    """In the round, from 1."""
    trees: int
    wall_s: float
    """From the first tree sent to the last answer."""
    replay_cpu_s: float
    """Of the replay process meanwhile."""
    wire_bytes: int
    disk_bytes: int
    """By which the folder grew."""

    @property
    def trees_per_s(self) -> float:
        """Delivered and answered."""
        return self.trees / self.wall_s

    @property
    def mb_per_s(self) -> float:
        """10^6 bytes on the wire."""
        return self.wire_bytes / self.wall_s / 1e6

    @property
    def wire_bytes_per_token(self) -> float:
        """Of a unique token."""
        return self.wire_bytes / (self.trees * self.tokens)

    @property
    def disk_bytes_per_token(self) -> float:
        """Of a unique token."""
        return self.disk_bytes / (self.trees * self.tokens)


@dataclass(frozen=True, slots=True)
class Latency:
    """From when a tree was due to its answer, at a given rate."""

    arm: Arm
    tokens: int
    trees: int
    rate: float
    """Trees/s."""
    p50_s: float
    p99_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class Crowd:
    """Many simulated actors on one replay process, and a learner that draws."""

    actors: int
    processes: int
    tokens: int
    trees: int
    """Answered within the time."""
    wall_s: float
    least_trees: int
    """Of an actor."""
    most_trees: int
    p50_s: float
    """From sending a tree to its answer, over all actors."""
    p99_s: float
    rss_bytes: int
    """Of the replay process at the end."""

    @property
    def trees_per_s(self) -> float:
        """Leased, delivered, answered and drawn."""
        return self.trees / self.wall_s


@dataclass(frozen=True, slots=True)
class Memory:
    """A look at the replay process."""

    trees: int
    """Delivered so far."""
    seconds: float
    rss_bytes: int
    own_bytes: int
    """Not shared with other processes."""
    disk_bytes: int
    files: int
    """Open ones."""


_DERIVED = ("trees_per_s", "mb_per_s", "wire_bytes_per_token", "disk_bytes_per_token")
Sample = Burst | Latency | Crowd | Memory


def append(file: Path, samples: Iterable[Sample]) -> None:
    """Add rows of one kind, after a header if the file is new."""
    rows = [_row(sample) for sample in samples]
    if rows:
        append_rows(file, [*rows[0]], rows)


def _row(sample: Sample) -> dict[str, object]:
    derived = {name: getattr(sample, name) for name in _DERIVED if hasattr(sample, name)}
    return {**asdict(sample), **derived}
