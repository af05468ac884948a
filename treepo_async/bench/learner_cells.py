"""What is measured of the learner, and the words behind `bench.py learner` that say so. Imports nothing but the standard library."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from itertools import product
from pathlib import Path

from treepo_async.bench.words import read_words
from treepo_async.config.schema import ATTENTIONS, DTYPES, RECOMPUTES
from treepo_async.errors import ConfigError


class Way(StrEnum):
    """How the same trajectories are trained."""

    TREE = "tree"
    """Tokens that trajectories share are computed once."""
    FLAT = "flat"
    """Each trajectory by itself, packed behind one another."""
    PADDED = "padded"
    """Each by itself, padded to the longest."""
    AUTO = "auto"
    """Per tree what the cost model expects to be faster; measured only where that is neither the first nor the second."""


class Branching(StrEnum):
    """Where made trees fork."""

    EARLY = "early"
    """Into two at every level from the first, until the width is reached."""
    SPREAD = "spread"
    """Into two at levels as far apart as possible."""
    LATE = "late"
    """Into two at every one of the last levels."""
    TREEPO = "treepo"
    """Early, but one path in ten ends at each level from the third, its forks go to others, and last segments are short."""
    FILE = "file"
    """As the trees of the file do."""


@dataclass(frozen=True, slots=True)
class LearnerCell:
    """One point of a sweep; its fields are named as the command line's keys. Of trees from a file, sizes are 0."""

    shape: str
    dtype: str
    attention: str
    recompute: str
    budget: int
    """Most tokens of a microbatch."""
    prompts: int
    """Trees of an update."""
    trees: str
    """The file they are from; nothing: made."""
    branching: Branching
    width: int
    depth: int
    segment: int
    prompt: int

    def __str__(self) -> str:
        return (
            self.trees
            or f"{self.branching} {self.depth}x{self.segment} width {self.width} prompt {self.prompt}"
        )


CELL_FIELDS = tuple(field.name for field in fields(LearnerCell))

DEFAULTS = {
    "shape": "cpu",
    "dtype": "float32",
    "attention": "auto",
    "recompute": "none",
    "budget": "4096",
    "prompts": "1",
    "trees": "",
    "branching": "early,spread,late,treepo",
    "width": "8,16,64",
    "depth": "7",
    "segment": "32",
    "prompt": "32",
    "rounds": "5",
    "out": "runs/bench-learner",
}
SWEPT = ("branching", "width", "depth", "segment", "prompt")
"""Keys that take a list: the sweep is over all combinations, the first key slowest."""
CHOICES = {
    "dtype": DTYPES,
    "attention": ATTENTIONS,
    "recompute": RECOMPUTES,
}


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """What to measure, and where to write it."""

    cells: tuple[LearnerCell, ...]
    rounds: int
    """Measurements of every way, per cell."""
    out: Path


def parse(words: Sequence[str]) -> LearnerOptions:
    """Read `key=value` words; see `DEFAULTS` for the keys.

    Raises:
        ConfigError: an unknown key, a value that is not one, or a tree that cannot be made.
    """
    given = read_words(words, {key: value or "FILE" for key, value in DEFAULTS.items()})
    values = DEFAULTS | given
    for key, choices in CHOICES.items():
        _one_of(key, values[key], choices)
    if values["trees"]:
        for key in given.keys() & set(SWEPT):
            raise ConfigError(
                f"{key}={given[key]} is of trees that are made; leave out it or trees="
            )
        points = [(Branching.FILE, 0, 0, 0, 0)]
    else:
        points = _made(values)
    cells = tuple(
        LearnerCell(
            shape=values["shape"],
            dtype=values["dtype"],
            attention=values["attention"],
            recompute=values["recompute"],
            budget=_number("budget", values["budget"]),
            prompts=_number("prompts", values["prompts"]),
            trees=values["trees"],
            branching=branching,
            width=width,
            depth=depth,
            segment=segment,
            prompt=prompt,
        )
        for branching, width, depth, segment, prompt in points
    )
    for cell in cells:
        _check(cell)
    return LearnerOptions(cells, _number("rounds", values["rounds"]), Path(values["out"]))


_Point = tuple[Branching, int, int, int, int]


def _made(values: Mapping[str, str]) -> list[_Point]:
    """All combinations of the keys that are swept."""
    names = tuple(name for name in Branching if name is not Branching.FILE)
    kinds = [Branching(_one_of("branching", name, names)) for name in _list(values["branching"])]
    widths, depths, segments, prompts = (
        [_number(key, part) for part in _list(values[key])] for key in SWEPT[1:]
    )
    return list(product(kinds, widths, depths, segments, prompts))


def row_of(cell: LearnerCell) -> dict[str, object]:
    """A cell as columns of a table."""
    return asdict(cell)


def _list(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _one_of(key: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigError(f"{key}={value} is unknown; it is one of {', '.join(choices)}")
    return value


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        many = ", or several with commas" if key in SWEPT else ""
        raise ConfigError(
            f"{key}={text!r} is not a whole number from 1{many}, e.g. {key}={DEFAULTS[key]}"
        )
    return int(text)


def _check(cell: LearnerCell) -> None:
    if cell.branching is Branching.FILE:
        return
    if cell.width > 2**cell.depth:
        raise ConfigError(
            f"depth={cell.depth} is too shallow for width={cell.width}: two paths a fork make {2**cell.depth}"
        )
    if cell.branching is not Branching.TREEPO and cell.width & (cell.width - 1):
        raise ConfigError(
            f"width={cell.width} is no power of 2, which branching={cell.branching} needs"
        )
