"""`bench.py sim`: simulated runs on their own.

    calibrate=RUN predict=RUN,RUN   the service times of a real run, and what they predict for others
    validate=DIR                    the same with three runs that are made in DIR, where they are not there yet
    (neither) [actors=8,...,1024]   how far a run can grow, see `sim_scale`

`bench.py async backend=sim` has the arms of the comparison. Waits: only `validate`, for its runs (`RUN_S` each).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.bench import machine, sim_scale
from treepo_async.bench.cell_runs import Cell, finish
from treepo_async.bench.sim_calibrate import calibrate, predict, table
from treepo_async.bench.sim_run import read_real_run
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError

EXAMPLES = {
    "calibrate": "runs/a",
    "predict": "runs/b,runs/c",
    "validate": "runs/validate",
    "actors": "8,64,512",
    "out": "runs/bench-sim",
}
RUN_S = 600.0
COMMON = (
    # a core for the learner alone: roles that take turns on cores are not simulated
    "engine.cores=0",
    "actor.cores=0",
    "learner.cores=1",
    # a step of a synchronous run varies by half, with how many trees are replaced one after the other
    "steps=32",
    "eval.every=0",
    "checkpoint.every=1000",
    "actor.concurrent_trees=36",
    "learner.minibatches=2",
    "metrics.tensorboard=false",
)
VALIDATION = (
    Cell("ahead", ("replay.max_staleness=2", "replay.prompts_per_batch=8")),
    Cell("synchronous", ("replay.max_staleness=0", "replay.prompts_per_batch=8")),
    Cell("large", ("replay.max_staleness=1", "replay.prompts_per_batch=16")),
)
"""The first is calibrated on, as its step time varies the least, the others are predicted."""

Run = Callable[[Sequence[str], Path, float], int]
"""Makes a real run: keys, file of its output, deadline in seconds; gives the exit code."""


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What is asked for."""

    calibrate: Path | None
    predict: tuple[Path, ...]
    validate: Path | None
    actors: tuple[int, ...]
    out: Path


def parse(words: Sequence[str]) -> SimOptions:
    """Read `key=value` words.

    Raises:
        ConfigError: an unknown key, a size that is none, or keys that do not go together.
    """
    values = read_words(words, EXAMPLES)
    if ("calibrate" in values) != ("predict" in values):
        raise ConfigError("calibrate=RUN and predict=RUN,... go together")
    if "validate" in values and len(values) > 1:
        raise ConfigError("validate=DIR goes without other keys")
    sizes = values.get("actors", ",".join(map(str, sim_scale.SIZES))).split(",")
    if not all(size.isdecimal() and int(size) and not int(size) % sim_scale.UNIT for size in sizes):
        raise ConfigError(
            f"actors={','.join(sizes)} must be multiples of {sim_scale.UNIT}, the actors of an engine"
        )
    return SimOptions(
        calibrate=Path(values["calibrate"]) if "calibrate" in values else None,
        predict=tuple(map(Path, values.get("predict", "").split(","))),
        validate=Path(values["validate"]) if "validate" in values else None,
        actors=tuple(map(int, sizes)),
        out=Path(values.get("out", EXAMPLES["out"])),
    )


def simulate(options: SimOptions, run: Run, say: Callable[[str], None]) -> None:
    """Do what is asked for, and say the table.

    Raises:
        DataError: a folder is none of a run, or too short.
        TreepoError: a run of `validate` failed.
    """
    if options.validate is not None:
        say(validated(options.validate, run, say))
    elif options.calibrate is not None:
        say(compared(options.calibrate, options.predict))
    else:
        say(sim_scale.write(sim_scale.simulate(say, options.actors), options.out))


def validated(folder: Path, run: Run, say: Callable[[str], None]) -> str:
    """Make the runs that are missing; calibrate on the first, predict the others. Gives the table, also written."""
    folder.mkdir(parents=True, exist_ok=True)
    machine.note(folder / "environment.json")
    for cell in VALIDATION:
        done = finish(cell, COMMON, folder, lambda keys, log: run(keys, log, RUN_S))
        say(f"{cell.label}: {done.words}")
    first, *others = (folder / cell.label for cell in VALIDATION)
    text = compared(first, others)
    (folder / "table.md").write_text(text)
    return text


def compared(first: Path, others: Sequence[Path]) -> str:
    """Calibrate on a run and predict others. Gives the table."""
    run = read_real_run(first)
    settings = calibrate(run)
    return table(run, settings, [predict(settings, read_real_run(other)) for other in others])
