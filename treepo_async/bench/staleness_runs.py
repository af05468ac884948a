"""A run of the staleness grid, read from its folder: what it was told, how it learned, how stale its tokens were.

Of two records of a step the later one counts (`docs/metrics.md`). A run that did not come to its end is read as far as it got.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treepo_async.errors import DataError

OWN_KEYS = frozenset(
    (
        *("seed", "replay.max_staleness", "learner.correction", "learner.loss.correction"),
        *("run_dir", "resume", "cache_dir", "weights.dir", "engine.url", "engine.api_key_file"),
    )
)
"""Keys in which runs of one grid differ: what makes them cells of it, and where a run keeps and finds things."""
OWN_SECTION = "cluster."
"""Where processes run, likewise."""
_LAST_QUARTER = 4


@dataclass(frozen=True, slots=True)
class Point:
    """An evaluation."""

    step: int
    trained_tokens: int
    """Until then, each once for every leaf below it."""
    trained_tokens_unique: int
    decoded_tokens: int
    """Of all trees that had arrived, trained or not."""
    seconds: float
    """From the first evaluation; evaluations take part of it."""
    sampled_accuracy: float
    greedy_accuracy: float


@dataclass(frozen=True)
class StaleRun:
    """A run."""

    name: str
    max_staleness: int
    correction: str
    seed: int
    setup: Mapping[str, Any]
    """All keys that the runs of a grid have in common, by their whole names."""
    has_ended: bool
    """It trained all of its steps."""
    points: tuple[Point, ...]
    reward: float | None
    """Mean of the last quarter of the steps; None without a step."""
    staleness_mean: float | None
    staleness_max: int
    ess: Mapping[str, tuple[float, float]]
    """By lag: tokens of all steps, and the mean effective sample size over them."""
    step_s: float
    """Median; NaN without a step."""


def read_run(folder: Path) -> StaleRun:
    """Read a folder.

    Raises:
        DataError: it has no config, or a line of its metrics that no run writes.
    """
    config = _config(folder)
    records = _records(folder / "metrics.jsonl")
    steps = _last_of_each([r for r in records if "reward/mean" in r])
    evals = _last_of_each([r for r in records if "eval/sampled_accuracy" in r])
    return StaleRun(
        name=folder.name,
        max_staleness=config["replay"]["max_staleness"],
        correction=_correction(config["learner"]),
        seed=config["seed"],
        setup=_setup(config),
        has_ended=len(steps) >= config["steps"],
        points=tuple(_points(steps, evals)),
        reward=_reward(steps),
        staleness_mean=_staleness(steps),
        staleness_max=max((int(step["staleness/max"] or 0) for step in steps), default=0),
        ess=_ess(steps),
        step_s=statistics.median([s["time/wall_s"] for s in steps]) if steps else float("nan"),
    )


def _config(folder: Path) -> Any:
    try:
        return yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DataError(
            f"{folder}: config.yaml cannot be read ({error}); give folders of runs"
        ) from error


def _setup(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = dict(_flat(config))
    own = OWN_KEYS.union(key for key in keys if key.startswith(OWN_SECTION))
    return {key: value for key, value in keys.items() if key not in own}


def _flat(section: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def _correction(learner: Mapping[str, Any]) -> str:
    """Wherever the key stands: `learner.correction` or `learner.loss.correction`."""
    for section in (learner, learner.get("loss")):
        if isinstance(section, dict) and "correction" in section:
            return str(section["correction"])
    raise DataError("config.yaml has no learner.correction; is it of a run?")


def _records(file: Path) -> list[dict[str, Any]]:
    """None where there is no file; a last line that was cut off is left out."""
    if not file.is_file():
        return []
    *whole, last = file.read_text().split("\n")
    if last:
        # a run that was killed while it wrote
        whole = [line for line in whole if line]
    try:
        return [json.loads(line) for line in whole if line]
    except ValueError as error:
        raise DataError(f"{file}: a line is no JSON ({error})") from error


def _last_of_each(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*{record["step"]: record for record in records}.values()]


def _points(steps: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> list[Point]:
    points = list[Point]()
    for record in evals:
        before = [step for step in steps if step["step"] <= record["step"]]
        points.append(
            Point(
                step=record["step"],
                trained_tokens=sum(map(_trained, before)),
                trained_tokens_unique=sum(step["tokens/unique"] for step in before),
                decoded_tokens=sum(step["tokens/decoded"] for step in before),
                seconds=round(record["time"] - evals[0]["time"], 3),
                sampled_accuracy=record["eval/sampled_accuracy"],
                greedy_accuracy=record["eval/greedy_accuracy"],
            )
        )
    return points


def _trained(step: Mapping[str, Any]) -> int:
    return int(sum(tokens for _, tokens in _lags(step, "tokens")))


def _lags(step: Mapping[str, Any], column: str) -> list[tuple[str, float]]:
    """A column of the table by lag."""
    parts = (name.split("/") for name in step if name.startswith("lag/"))
    return [(lag, step[f"lag/{lag}/{column}"]) for _, lag, name in parts if name == column]


def _reward(steps: Sequence[Mapping[str, Any]]) -> float | None:
    last = steps[-max(1, len(steps) // _LAST_QUARTER) :]
    return statistics.mean(step["reward/mean"] for step in last) if last else None


def _staleness(steps: Sequence[Mapping[str, Any]]) -> float | None:
    known = [
        (step["staleness/mean"], _trained(step))
        for step in steps
        if step["staleness/mean"] is not None
    ]
    tokens = sum(number for _, number in known)
    return sum(mean * number for mean, number in known) / tokens if tokens else None


def _ess(steps: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for step in steps:
        numbers = dict(_lags(step, "tokens"))
        for lag, ess in _lags(step, "ess"):
            tokens, mean = found.get(lag, (0.0, 0.0))
            more = numbers[lag]
            found[lag] = (tokens + more, (mean * tokens + ess * more) / (tokens + more))
    return found
