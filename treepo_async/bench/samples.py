"""What was measured: one row of `samples.csv` for each arm of each pair.

The file is only ever appended to, both arms of a pair at once, so that a sweep that was stopped goes on behind its last
whole pair. Columns are the cell's settings, the counts below, and figures that follow from them for the reader.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from treepo_async.bench.cells import CELL_FIELDS, Arm, Cell
from treepo_async.bench.rows import append_rows, read_rows


@dataclass(frozen=True, slots=True)
class Sample:
    """One arm of one pair: all trees, or all independent responses, of the cell's prompts."""

    cell: Cell
    arm: Arm
    pair: int
    """From 1."""
    place: int
    """1 if this arm was the pair's first, 2 if its second."""
    trajectories: int
    requests: int
    """Sent to the engine, those that only fill the cache included."""
    decoded_tokens: int
    delivered_tokens: int
    """Response tokens, counted once for each trajectory they belong to."""
    prefix_tokens: int
    """Submitted with the requests."""
    cached_tokens: int
    """Of these, served from the prefix cache."""
    child_requests: int
    """Those that continue a path, and not a prompt."""
    child_servable_tokens: int
    """All prefix tokens of these but the last of each, which must be computed to sample what follows."""
    child_cached_tokens: int
    wall_s: float
    engine_cpu_s: float
    """Processor time of the server: what is left of a speed-up on a machine that others use too."""

    @property
    def computed_tokens(self) -> int:
        """Prefix tokens that the engine had to compute."""
        return self.prefix_tokens - self.cached_tokens

    @property
    def decoded_per_delivered(self) -> float:
        """Tokens decoded for each one delivered."""
        return self.decoded_tokens / self.delivered_tokens

    @property
    def mean_delivered_tokens(self) -> float:
        """Response tokens of a trajectory."""
        return self.delivered_tokens / self.trajectories

    @property
    def trajectories_per_s(self) -> float:
        """The paper's TrajPS."""
        return self.trajectories / self.wall_s

    @property
    def tokens_per_s(self) -> float:
        """The paper's TokenPS: prompt and response of each trajectory are work, however they came about."""
        prompts = self.trajectories * self.cell.prompt
        return (self.delivered_tokens + prompts) / self.wall_s

    @property
    def processed_tokens_per_s(self) -> float:
        """TokenPS without what the cache served: tokens decoded and prefix tokens computed."""
        return (self.decoded_tokens + self.computed_tokens) / self.wall_s

    @property
    def decoded_tokens_per_s(self) -> float:
        """Tokens decoded."""
        return self.decoded_tokens / self.wall_s

    @property
    def child_cached_share(self) -> float | None:
        """Of what could be served of children's prefixes; None where nothing had children."""
        if self.child_servable_tokens == 0:
            return None
        return self.child_cached_tokens / self.child_servable_tokens


DERIVED = (
    "computed_tokens",
    "decoded_per_delivered",
    "mean_delivered_tokens",
    "trajectories_per_s",
    "tokens_per_s",
    "processed_tokens_per_s",
    "decoded_tokens_per_s",
    "child_cached_share",
)
_MEASURED = tuple(field.name for field in fields(Sample) if field.name != "cell")
_TYPES = {**get_type_hints(Cell), **get_type_hints(Sample)}
COLUMNS = (*CELL_FIELDS, *_MEASURED, *DERIVED)


def append(file: Path, samples: Iterable[Sample]) -> None:
    """Add rows, after a header if the file is new."""
    append_rows(file, COLUMNS, map(_row, samples))


def read(file: Path) -> list[Sample]:
    """All rows; none when there is no file.

    Raises:
        DataError: a line that `append` did not write.
    """
    types = {name: _TYPES[name] for name in (*CELL_FIELDS, *_MEASURED)}
    return [
        Sample(cell=Cell(**{name: values.pop(name) for name in CELL_FIELDS}), **values)
        for values in read_rows(file, types)
    ]


def _row(sample: Sample) -> dict[str, object]:
    measured = {name: getattr(sample, name) for name in (*_MEASURED, *DERIVED)}
    return {**asdict(sample.cell), **measured}
