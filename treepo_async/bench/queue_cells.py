"""From the words behind `bench.py queue` to what is measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError

DEFAULTS = {
    "tokens": "65536,4096",
    "segment": "256",
    "burst": "256",
    "window": "16",
    "peers": "4",
    "rounds": "7",
    "actors": "256",
    "seconds": "10",
    "trees": "0",
    "out": "runs/bench-queue",
}
BATCH_SIZE = 16
"""Trees of a step of the benchmark's learner."""
MAX_WINDOW = 16
"""As many trees as a connection holds (`wire.options.MAX_TREES`)."""


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """What to measure, and where to write it."""

    tokens: tuple[int, ...]
    """Unique tokens of a tree, one row each."""
    segment: int
    """Tokens of a segment."""
    burst: int
    """Trees delivered between two draws."""
    window: int
    """Trees of a connection without an answer."""
    peers: int
    """Connections that deliver, in turn."""
    rounds: int
    """Bursts of every arm."""
    actors: int
    """Simulated at once; 0: that is left out."""
    seconds: float
    """For which they deliver, and for which latency is measured; 0: both are left out."""
    trees: int
    """Deliver so many small ones and watch the memory, in place of everything else; 0: do not."""
    out: Path


def parse(words: Sequence[str]) -> QueueOptions:
    """Read `key=value` words; see `DEFAULTS` for the keys.

    Raises:
        ConfigError: an unknown key, a value that is no number, or numbers that do not go together.
    """
    values = DEFAULTS | read_words(words, DEFAULTS)
    least = {"actors": 0, "trees": 0, "seconds": 0}
    numbers = {
        key: _number(key, values[key], least.get(key, 1))
        for key in DEFAULTS.keys() - {"tokens", "out"}
    }
    options = QueueOptions(
        tokens=tuple(_number("tokens", word, 1) for word in values["tokens"].split(",")),
        out=Path(values["out"]),
        **numbers,
    )
    _check(options)
    return options


def _number(key: str, text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(
            f"{key}={text!r} is not a whole number from {least}, e.g. {key}={DEFAULTS[key]}"
        )
    return int(text)


def _check(options: QueueOptions) -> None:
    for tokens in options.tokens:
        if tokens % options.segment:
            raise ConfigError(f"tokens={tokens} is no multiple of segment={options.segment}")
    for key in ("burst", "trees"):
        if getattr(options, key) % BATCH_SIZE:
            raise ConfigError(
                f"{key}={getattr(options, key)} is no multiple of the batches of {BATCH_SIZE} trees that are drawn"
            )
    if options.window > MAX_WINDOW:
        raise ConfigError(
            f"window={options.window} is more than {MAX_WINDOW}, which a connection holds"
        )
