"""What was measured of the learner: one row of `samples.csv` for each way of each round.

The file is only ever appended to, all ways of a round at once, so that a sweep that was stopped goes on behind its last round.
Rounds of other code or another device stay in the file, and count for nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

from treepo_async.bench.learner_cells import CELL_FIELDS, LearnerCell, Way, row_of
from treepo_async.bench.rows import append_rows, read_rows


@dataclass(frozen=True, slots=True)
class Origin:
    """What samples must share to be of one measurement."""

    code: str
    """Digest of this project's source."""
    device: str

    def of(self, samples: Iterable["LearnerSample"]) -> list["LearnerSample"]:
        """The samples that have it."""
        return [s for s in samples if (s.code, s.device) == (self.code, self.device)]


@dataclass(frozen=True, slots=True)
class LearnerSample:
    """One way of one round: forward and backward of all trees of a cell."""

    cell: LearnerCell
    code: str
    device: str
    """See `Origin`."""
    way: Way
    round: int
    """From 1."""
    place: int
    """Of this way in its round, from 1."""
    trajectories: int
    tokens: int
    """Computed ones, padding of rows included."""
    trained: int
    """Tokens with a row of the output layer."""
    pieces: int
    microbatches: int
    flops: float
    """Of forward and backward, if no masked pair is computed."""
    whole_flops: float
    """The same if no tree had been cut to fit a microbatch."""
    expected_s: float
    """By the cost model."""
    choice: str
    """What the cost model takes for these trees: tree, flat, or auto where it differs among them."""
    wall_s: float
    cpu_s: float
    """Processor time of this process."""
    peak_bytes: int
    """Most memory above that before the pass, from a pass of its own."""
    gradient_norm: float
    gradient_gap: float
    """Largest difference from flat packing of a tensor's gradient, relative to its norm; 0 of flat, and of padded, which differs."""


_MEASURED = tuple(field.name for field in fields(LearnerSample) if field.name != "cell")
_TYPES = {**get_type_hints(LearnerCell), **get_type_hints(LearnerSample)}
COLUMNS = (*CELL_FIELDS, *_MEASURED)


def append(file: Path, samples: Iterable[LearnerSample]) -> None:
    """Add rows, after a header if the file is new."""
    append_rows(file, COLUMNS, map(_row, samples))


def read(file: Path) -> list[LearnerSample]:
    """All rows; none when there is no file.

    Raises:
        DataError: a line that `append` did not write.
    """
    types = {name: _TYPES[name] for name in COLUMNS}
    return [
        LearnerSample(
            cell=LearnerCell(**{name: values.pop(name) for name in CELL_FIELDS}), **values
        )
        for values in read_rows(file, types)
    ]


def rounds_of(
    samples: Iterable[LearnerSample], cell: LearnerCell
) -> list[dict[Way, LearnerSample]]:
    """The rounds of a cell, by their number."""
    found: dict[int, dict[Way, LearnerSample]] = {}
    for sample in samples:
        if sample.cell == cell:
            found.setdefault(sample.round, {})[sample.way] = sample
    return [found[number] for number in sorted(found)]


def _row(sample: LearnerSample) -> dict[str, object]:
    return {**row_of(sample.cell), **{name: getattr(sample, name) for name in _MEASURED}}
