"""From the words behind `bench.py async` to what is measured. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_async.bench.async_rows import Arm
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError

BACKENDS = ("sim", "scripted", "real")
UPDATES = ("retract", "in_place")
DEFAULTS = {
    "backend": "scripted",
    "arms": ",".join(Arm),
    "seeds": "0,1,2",
    "staleness": "4",
    "update": "retract",
    "steps": "24",
    "warm_up": "4",
    "actor_core": "0",
    "actors": "8",
    "slots": "2",
    "prompts": "20",
    "segment": "32",
    "depth": "32",
    "width": "8",
    "median": "64",
    "tail": "10",
    "token_ms": "2",
    "publish_ms": "15",
    "load_ms": "50",
    "balance": "1.08",
    "seconds": "8",
    "out": "runs/bench-async",
}
"""Keys with the values they have unless given. A word with a dot in its key, as `learner.lr=3e-5`, is a key of real runs."""
_TIMED = (
    *("actors", "slots", "prompts", "segment", "depth", "width", "median", "tail"),
    *("token_ms", "publish_ms", "load_ms", "balance"),
)
ONLY_OF = {
    "steps": ("sim", "real"),
    "warm_up": ("sim", "real"),
    "actor_core": ("real",),
    "seconds": ("scripted",),
    **dict.fromkeys(_TIMED, ("scripted", "sim")),
}
"""Back ends of the keys that not all have."""
RUN_KEYS = (
    "eval.samples=4",
    "checkpoint.every=1000",
    "replay.drop_degenerate=false",
    "learner.minibatches=2",
    "learner.kl_coef=1e-3",
    "learner.packing=flat",
    "learner.recompute=full",
    "engine.max_running_requests=256",
    "tree.segment_tokens=20",
    "tree.max_depth=4",
)
"""Of every real run, before those of the command line: a learner that has as much to do as an engine, see
docs/async_benchmark.md."""


@dataclass(frozen=True, slots=True)
class ScriptedKeys:
    """See `async_script.Script`."""

    actors: int
    slots: int
    prompts: int
    segment: int
    depth: int
    width: int
    median: int
    tail: int
    token_ms: float
    publish_ms: float
    load_ms: float
    balance: float
    """Speed of generation over that of training, when neither waits."""
    seconds: float


@dataclass(frozen=True, slots=True)
class AsyncOptions:
    """What to measure, and where to write it."""

    backend: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    staleness: int
    update: str
    steps: int
    """Of a real or simulated run, which has `spare` more."""
    warm_up: int
    """Of these, those that are left out."""
    actor_core: int
    """Of a real run whose roles have a core each: the engine's is 0, the learner's 1."""
    scripted: ScriptedKeys
    run_keys: tuple[str, ...]
    """Of real runs, the later ones hold."""
    out: Path

    @property
    def spare(self) -> int:
        """Steps of every real or simulated run behind those that count.

        Nothing is leased for a batch behind the last one. So in the last K steps of an arm stock is trained while the engine
        rests, and they count in none. All arms have as many, so that all are evaluated after as many updates.
        """
        return self.staleness

    def cells(self) -> list[tuple[Arm, int]]:
        """In the order in which they are measured: by seed, each beginning with another arm."""
        turns = enumerate(self.seeds)
        return [(arm, seed) for turn, seed in turns for arm in _rotated(self.arms, turn)]


def parse(words: Sequence[str]) -> AsyncOptions:
    """Read `key=value` words; see `DEFAULTS` for the keys.

    Raises:
        ConfigError: an unknown key, a value that is none of its key, or keys that do not go together.
    """
    dotted = [word for word in words if "." in word.partition("=")[0]]
    given = read_words([word for word in words if word not in dotted], DEFAULTS)
    values = DEFAULTS | given
    backend = _one_of("backend", values["backend"], BACKENDS)
    for key in given:
        if backend not in (of := ONLY_OF.get(key, BACKENDS)):
            raise ConfigError(
                f"{key}={given[key]} is of backend={' and '.join(of)}, {backend} would not heed it; leave it out"
                + (", or name the key of a run, as tree.width=32" if backend == "real" else "")
            )
    if dotted and backend != "real":
        raise ConfigError(
            f"{dotted[0]} is a key of a run; backend={backend} has none, take backend=real"
        )
    steps, warm_up = _whole("steps", values["steps"]), _whole("warm_up", values["warm_up"])
    if steps <= warm_up:
        raise ConfigError(f"steps={steps} leaves nothing after warm_up={warm_up}")
    out = DEFAULTS["out"] + "-" + backend if values["out"] == DEFAULTS["out"] else values["out"]
    return AsyncOptions(
        backend=backend,
        arms=tuple(Arm(_one_of("arms", name, tuple(Arm))) for name in _names(values["arms"])),
        seeds=tuple(_whole("seeds", text, least=0) for text in _names(values["seeds"])),
        staleness=_whole("staleness", values["staleness"]),
        update=_one_of("update", values["update"], UPDATES),
        steps=steps,
        warm_up=warm_up,
        actor_core=int(_one_of("actor_core", values["actor_core"], ("0", "1"))),
        scripted=_scripted(values),
        run_keys=(*RUN_KEYS, *dotted),
        out=Path(out),
    )


def _scripted(values: dict[str, str]) -> ScriptedKeys:
    whole = ("actors", "slots", "prompts", "segment", "depth", "width", "median", "tail")
    real = ("token_ms", "publish_ms", "load_ms", "balance", "seconds")
    found: dict[str, Any] = {key: _whole(key, values[key]) for key in whole}
    found |= {key: _positive(key, values[key]) for key in real}
    return ScriptedKeys(**found)


def _rotated(arms: tuple[Arm, ...], turn: int) -> tuple[Arm, ...]:
    """None has the machine at its best every time."""
    first = turn % len(arms)
    return (*arms[first:], *arms[:first])


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(text.split(",")))


def _one_of(key: str, text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ConfigError(f"{key}={text!r} is unknown; it is one of {', '.join(choices)}")
    return text


def _whole(key: str, text: str, *, least: int = 1) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(
            f"{key}={text!r} is not a whole number from {least}, e.g. {key}={DEFAULTS[key]}"
        )
    return int(text)


def _positive(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    # written so that NaN is none either
    if not 0 < value < float("inf"):
        raise ConfigError(f"{key}={text!r} is not a number above 0, e.g. {key}={DEFAULTS[key]}")
    return value
