"""What `bench.py routing` compares: ways to choose an engine, kinds of weight updates, and uneven trees.

Pure. The sizes of trees have a heavy tail: most have the least number of leaves, some many times as many.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import NamedTuple, TypeVar

from treepo_async.bench.words import read_words
from treepo_async.engine.routing import Choice, Choose, Move, Reading, Work, choose
from treepo_async.errors import ConfigError

DEFAULTS = {
    "actors": "3",
    "concurrent": "4",
    "trees": "36",
    "rounds": "3",
    "policies": "prefix,random,round_robin",
    "updates": "none,drain,retract",
    "layers": "2",
    "hidden": "128",
    "out": "runs/bench-routing",
}
NUM_ENGINES = 2
NUM_UPDATES = 3
"""In one measurement, spread evenly over its trees."""
SEGMENT_TOKENS = 16
MIN_WIDTH, MAX_WIDTH = 4, 48
MIN_DEPTH, MAX_DEPTH = 2, 7
PROMPT_TOKENS = (128, 384)
TAIL = 1.2
"""Exponent of the Pareto distribution of widths: the smaller, the heavier its tail."""


Name = TypeVar("Name", bound=StrEnum)


class PolicyName(StrEnum):
    """How an engine is chosen."""

    PREFIX = "prefix"
    """As actors do: see `engine.routing`."""
    RANDOM = "random"
    """Control: any, for each request anew."""
    ROUND_ROBIN = "round_robin"
    """Control: the next one, for each request anew."""


class Update(StrEnum):
    """What becomes of running requests when the weights change."""

    NONE = "none"
    """No change."""
    DRAIN = "drain"
    RETRACT = "retract"


class TreeShape(NamedTuple):
    """Of one tree."""

    width: int
    depth: int
    prompt_tokens: int


class RoutingCell(NamedTuple):
    """One measurement."""

    policy: PolicyName
    update: Update
    round: int


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """What to measure, and where to write it."""

    actors: int
    concurrent: int
    """Trees of an actor at once."""
    trees: int
    """Of a measurement, of all actors."""
    rounds: int
    policies: tuple[PolicyName, ...]
    updates: tuple[Update, ...]
    layers: int
    hidden: int
    out: Path

    @property
    def cells(self) -> list[RoutingCell]:
        """In the order in which they are measured: all ways in every round, so that a slow time slows all."""
        return [
            RoutingCell(policy, update, number)
            for number in range(1, self.rounds + 1)
            for update in self.updates
            for policy in self.policies
        ]


def parse(words: Sequence[str]) -> RoutingOptions:
    """Read `key=value` words.

    Raises:
        ConfigError: naming the key, and what it may be.
    """
    values = DEFAULTS | read_words(words, DEFAULTS)
    return RoutingOptions(
        actors=_number(values, "actors"),
        concurrent=_number(values, "concurrent"),
        trees=_number(values, "trees"),
        rounds=_number(values, "rounds"),
        policies=_names(values, "policies", PolicyName),
        updates=_names(values, "updates", Update),
        layers=_number(values, "layers"),
        hidden=_number(values, "hidden"),
        out=Path(values["out"]),
    )


def shapes_of(number: int, seed: int) -> list[TreeShape]:
    """So many trees; the same for the same seed."""
    rng = random.Random(seed)
    return [
        TreeShape(
            width=min(MAX_WIDTH, int(MIN_WIDTH * rng.paretovariate(TAIL))),
            depth=rng.randint(MIN_DEPTH, MAX_DEPTH),
            prompt_tokens=rng.randint(*PROMPT_TOKENS),
        )
        for _ in range(number)
    ]


def policy_of(name: PolicyName, seed: int) -> Choose:
    """The function that chooses; a control asks neither for load nor for prefix."""
    if name is PolicyName.PREFIX:
        return choose
    rng, numbers = random.Random(seed), count()

    def control(readings: Sequence[Reading], home: int | None, work: Work) -> Choice | None:
        there = [i for i, reading in enumerate(readings) if not reading.is_out]
        if not there:
            return None
        number = rng.randrange(len(there)) if name is PolicyName.RANDOM else next(numbers)
        engine = there[number % len(there)]
        return Choice(engine, Move.HOME if home in (None, engine) else Move.SPILLED)

    return control


def _number(values: dict[str, str], key: str) -> int:
    if not values[key].isdigit() or int(values[key]) < 1:
        raise ConfigError(f"{key}={values[key]} must be a whole number from 1")
    return int(values[key])


def _names(values: dict[str, str], key: str, kind: type[Name]) -> tuple[Name, ...]:
    try:
        return tuple(kind(word) for word in values[key].split(","))
    except ValueError as error:
        raise ConfigError(
            f"{key}={values[key]}: {error}; it is some of {','.join(kind)}"
        ) from error
