"""From the words behind `bench.py weights` to what is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.bench.model import HIDDEN_STEP
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError

DEFAULTS = {
    "layers": "10",
    "hidden": "512",
    "rounds": "7",
    "stages": "1,2",
    "bucket": str(24 * 2**20),
    "folder": "/dev/shm",
    "out": "runs/bench-weights",
}


@dataclass(frozen=True, slots=True)
class WeightsOptions:
    """What to measure, and where to write it."""

    layers: int
    hidden: int
    """Of the model."""
    rounds: int
    """Updates by every arm; one before them is not counted."""
    stages: tuple[int, ...]
    """Pipeline stages that send, one arm each."""
    bucket: int
    """Bytes of tensors that are broadcast together."""
    folder: Path
    """Publications and plain copies lie in a new folder in it."""
    out: Path

    @property
    def arms(self) -> tuple[str, ...]:
        """Ways of an update, in the order in which they take turns."""
        return ("disk", *(f"broadcast-{stages}" for stages in self.stages))


def parse(words: Sequence[str]) -> WeightsOptions:
    """Read `key=value` words; see `DEFAULTS` for the keys.

    Raises:
        ConfigError: an unknown key, or a value that cannot be measured.
    """
    values = DEFAULTS | read_words(words, DEFAULTS)
    layers, hidden, rounds, bucket = (
        _number(key, values[key]) for key in ("layers", "hidden", "rounds", "bucket")
    )
    if hidden % HIDDEN_STEP:
        raise ConfigError(f"hidden={hidden} is not a multiple of {HIDDEN_STEP}")
    folder = Path(values["folder"])
    if not folder.is_dir():
        raise ConfigError(f"folder={folder} is no folder")
    stages = tuple(_number("stages", part) for part in values["stages"].split(","))
    return WeightsOptions(layers, hidden, rounds, stages, bucket, folder, Path(values["out"]))


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ConfigError(
            f"{key}={text!r} is not a whole number from 1, e.g. {key}={DEFAULTS[key]}"
        )
    return int(text)
