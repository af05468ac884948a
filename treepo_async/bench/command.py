"""From the words behind `bench.py sampling` to the cells of a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from treepo_async.bench.cells import Cell, Stop
from treepo_async.bench.learner_shapes import find_shape
from treepo_async.bench.model import HIDDEN_STEP, MAX_CONTEXT
from treepo_async.bench.shapes import paths_per_level, reaches_width
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError

DEFAULTS = {
    "depth": "7",
    "segment": "16",
    "width": "16,64",
    "branch": "2",
    "prompt": "256",
    "prompts": "8",
    "pairs": "5",
    "layers": "8",
    "hidden": "512",
    "shape": "",
    "running": "64",
    "stop": "none",
    "out": "runs/bench-sampling",
}
SWEPT = ("depth", "segment", "width", "branch", "prompt")
"""Keys that take a list: the sweep is over all combinations, the first key slowest."""


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What to measure, and where to write it."""

    cells: tuple[Cell, ...]
    pairs: int
    """Measurements of both arms, per cell."""
    out: Path


def parse(words: Sequence[str]) -> SamplingOptions:
    """Read `key=value` words; see `DEFAULTS` for the keys.

    Raises:
        ConfigError: an unknown key, a value that is no number or no list of numbers, or a cell that cannot be measured.
    """
    given = read_words(words, {key: value or "qwen2.5-0.5b" for key, value in DEFAULTS.items()})
    values = DEFAULTS | given
    if values["shape"]:
        find_shape(values["shape"])
    swept = {key: _numbers(key, values[key]) for key in SWEPT}
    single = {k: _number(k, values[k]) for k in ("prompts", "layers", "hidden", "running")}
    stop = _stop(values["stop"])
    cells = tuple(
        Cell(**dict(zip(SWEPT, point, strict=True)), **single, stop=stop, shape=values["shape"])
        for point in product(*swept.values())
    )
    for cell in cells:
        _check(cell)
    return SamplingOptions(cells, _number("pairs", values["pairs"]), Path(values["out"]))


def _numbers(key: str, text: str) -> list[int]:
    parts = list(dict.fromkeys(text.split(",")))
    return [_number(key, part) for part in parts]


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        wanted = (
            "a whole number from 1, or several with commas"
            if key in SWEPT
            else "a whole number from 1"
        )
        raise ConfigError(f"{key}={text!r} is not {wanted}, e.g. {key}={DEFAULTS[key]}")
    return int(text)


def _stop(text: str) -> Stop:
    if text not in set(Stop):
        raise ConfigError(f"stop={text!r} is unknown; it is one of {', '.join(Stop)}")
    return Stop(text)


def _check(cell: Cell) -> None:
    if cell.branch < 2:
        raise ConfigError(f"branch={cell.branch} forks nothing; it must be at least 2")
    if cell.branch > cell.width:
        raise ConfigError(f"branch={cell.branch} is more than width={cell.width}")
    if cell.hidden % HIDDEN_STEP:
        raise ConfigError(f"hidden={cell.hidden} is not a multiple of {HIDDEN_STEP}")
    if cell.context > MAX_CONTEXT:
        raise ConfigError(
            f"prompt={cell.prompt} and depth={cell.depth} x segment={cell.segment} are {cell.context} tokens; "
            f"the model takes {MAX_CONTEXT}"
        )
    shape = (cell.width, cell.depth, cell.branch, cell.branch)
    if not reaches_width(*shape):
        raise ConfigError(
            f"depth={cell.depth} is too shallow for width={cell.width}: with branch={cell.branch} a tree has "
            f"{paths_per_level(*shape)[-1]} trajectories; take more depth, less width or a larger branch"
        )
