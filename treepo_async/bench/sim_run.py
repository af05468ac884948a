"""What a simulation takes from the folder of a real run: its size and rules, how long its steps took, and of what.

Steady steps are those behind the first `WARM_UP` that no evaluation delayed; what a run shows of learning is of all steps.
Neighbour: `sim_calibrate` makes settings of it.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treepo_async.bench.sim_trees import Seen, TreeShape
from treepo_async.errors import DataError

WARM_UP = 4
LEAST_STEADY = 6
NUM_LENGTHS = 1000
Record = Mapping[str, Any]


@dataclass(frozen=True)
class RealRun:
    """A run that was made."""

    name: str
    actors: int
    trees_per_actor: int
    engines: int
    prompts_per_batch: int
    max_staleness: int
    update_mode: str
    max_running: int
    num_steps: int
    shape: TreeShape
    lengths: Seen
    drop_degenerate: bool
    max_refills: int
    drops: tuple[tuple[int, int, int, float], ...]
    """Of every step in which trees arrived: its number, those without spread, those accepted, mean staleness of what it trained."""
    dropped_size: float
    """Mean tokens of a tree that was dropped, over those of one that was trained; 1 where none was dropped."""
    degenerate: float
    """Share of the trees that arrived in the steady steps."""
    step_s: float
    """Mean over the steady steps, as all below."""
    train_s: float
    publish_s: float
    load_s: float
    tokens: float
    """Unique tokens of a batch."""
    num_steady: int


def read_real_run(folder: Path) -> RealRun:
    """Read a folder.

    Raises:
        DataError: it is no run's, the run was interrupted, has rules that are not modelled, or too few steady steps.
    """
    config, records = _read(folder)
    _check(folder, config, records)
    steps = [r for r in records if "reward/mean" in r]
    steady = steady_steps(records)
    if len(steady) < LEAST_STEADY:
        raise DataError(
            f"{folder}: {len(steady)} steps are behind the first {WARM_UP} and not delayed by an evaluation, "
            f"at least {LEAST_STEADY} are needed; run more, or with eval.every=0"
        )
    arrived = sum(_count(r, "degenerate") + _count(r, "accepted") for r in steady)
    return RealRun(
        name=folder.name,
        actors=config["actors"],
        trees_per_actor=config["actor"]["concurrent_trees"],
        engines=config["engines"],
        prompts_per_batch=config["replay"]["prompts_per_batch"],
        max_staleness=config["replay"]["max_staleness"],
        update_mode=config["engine"]["update_mode"],
        max_running=config["engine"]["max_running_requests"],
        num_steps=config["steps"],
        shape=_shape(config["tree"]),
        lengths=lengths_of(steps, config["tree"]["segment_tokens"]),
        drop_degenerate=config["replay"]["drop_degenerate"],
        max_refills=config["replay"]["max_refills"],
        drops=drops_of(steps),
        dropped_size=dropped_size(steps),
        degenerate=sum(_count(r, "degenerate") for r in steady) / arrived if arrived else 0.0,
        step_s=statistics.mean(r["time/wall_s"] for r in steady),
        train_s=statistics.mean(r["time/train_s"] for r in steady),
        publish_s=statistics.mean(r["time/publish_s"] for r in steady),
        load_s=statistics.mean(
            r["weights/load_s"] + r["weights/probe_s"]
            for r in steady
            if r.get("weights/load_s") is not None
        ),
        tokens=statistics.mean(r["tokens/unique"] for r in steady),
        num_steady=len(steady),
    )


def steady_steps(records: Sequence[Record]) -> list[Record]:
    """Records of the steps that no evaluation delayed, behind the first ones; a step done again counts once."""
    evaluated = {r["step"] for r in records if "eval/sampled_accuracy" in r}
    steps = {r["step"]: r for r in records if "reward/mean" in r}
    return [r for s, r in steps.items() if s > WARM_UP and s - 1 not in evaluated]


def lengths_of(steps: Sequence[Record], segment_tokens: int) -> Seen:
    """Lengths of responses from the tokens on each grid level: a level is reached by as many as have tokens on it.

    A path that ends within a level is put into its middle, so that a level has the mean it had.
    """
    tokens = [0.0] * (1 + max((int(level) for r in steps for level in _levels(r)), default=0))
    for record in steps:
        for name in _levels(record):
            tokens[int(name)] += record[f"level/{name}/tokens"]
    if not tokens[0]:
        raise DataError("the records have no level/0/tokens; is the run of trees?")
    reached = [number / tokens[0] for number in tokens]
    found = list[int]()
    for number in range(NUM_LENGTHS):
        place = (number + 0.5) / NUM_LENGTHS
        # the length whose share of responses is at least as long
        level = max(i for i, share in enumerate(reached) if share >= place)
        after = reached[level + 1] if level + 1 < len(reached) else 0.0
        within = (reached[level] - place) / (reached[level] - after)
        found.append(max(1, round((level + 0.5 + within) * segment_tokens)))
    return Seen(tuple(sorted(found)))


def drops_of(steps: Sequence[Record]) -> tuple[tuple[int, int, int, float], ...]:
    """See `RealRun.drops`; a record without staleness counts as one of trees of the policy itself."""
    counts = [
        (r["step"], _count(r, "degenerate"), _count(r, "accepted"), r.get("staleness/mean") or 0.0)
        for r in steps
    ]
    return tuple(count for count in counts if count[1] + count[2])


def dropped_size(steps: Sequence[Record]) -> float:
    """See `RealRun.dropped_size`: over a whole run what is decoded and not trained is of dropped trees."""
    dropped = sum(_count(r, "degenerate") for r in steps)
    accepted = sum(_count(r, "accepted") for r in steps)
    unique = sum(r["tokens/unique"] for r in steps)
    if not dropped or not accepted:
        return 1.0
    lost = sum(r["tokens/decoded"] for r in steps) - unique
    return float((lost / dropped) / (unique / accepted))


def _check(folder: Path, config: Any, records: Sequence[Record]) -> None:
    lineage = max((r.get("learner/lineage") or 0 for r in records), default=0)
    if lineage:
        raise DataError(
            f"{folder}: learner/lineage={lineage}, the run was interrupted and its times are of more than one attempt; "
            "make it again in an empty folder"
        )
    mode = config["engine"]["update_mode"]
    if mode != "drain":
        raise DataError(
            f"{folder}: engine.update_mode={mode} is not modelled: what a real engine takes to compute prefixes again is not "
            "measured; take a run with engine.update_mode=drain"
        )


def _levels(record: Record) -> list[str]:
    parts = (name.split("/") for name in record if name.startswith("level/"))
    return [level for _, level, column in parts if column == "tokens" and level.isdigit()]


def _read(folder: Path) -> tuple[Any, list[Record]]:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return config, [json.loads(line) for line in lines]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"{folder} is no folder of a run: {error}") from error


def _count(record: Record, outcome: str) -> int:
    return int(record.get(f"trees/{outcome}") or 0)


def _shape(tree: Record) -> TreeShape:
    return TreeShape(
        segment_tokens=tree["segment_tokens"],
        max_depth=tree["max_depth"],
        width=tree["width"],
        branch=tree["branching_factor"],
        first_fork=tree["first_fork_min"],
        growth=tree["growth"],
    )
