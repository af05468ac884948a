"""`bench.py sim`: simulated runs on their own.

    calibrate=RUN predict=RUN,RUN   the service times of a real run, and what they predict for others
    validate=DIR [seed=0]           the same with three runs of a seed, made in DIR where they are not there yet
    (neither) [actors=8,...,1024]   how far a run can grow, see `sim_scale`

`bench.py async backend=sim` has the arms of the comparison. Waits: only `validate`, for its runs (`RUN_S` each).
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.bench import machine, sim_scale
from treepo_async.bench.cell_runs import STATE_FILE, Cell, finish, is_finished, read_state
from treepo_async.bench.sim_calibrate import calibrate, predict, table
from treepo_async.bench.sim_run import read_real_run
from treepo_async.bench.words import read_words
from treepo_async.config.run_lock import LOCK_FILE, held
from treepo_async.config.wiring import CONFIG_FILE
from treepo_async.errors import ConfigError

EXAMPLES = {
    "calibrate": "runs/a",
    "predict": "runs/b,runs/c",
    "validate": "runs/validate",
    "seed": "0",
    "actors": "8,64,512",
    "out": "runs/bench-sim",
}
RUN_S = 600.0
COMMON = (
    # a core for the learner alone: roles that take turns on cores are not simulated
    "engine.cores=0",
    "actor.cores=0",
    "learner.cores=1",
    "eval.every=0",
    "checkpoint.every=1000",
    "actor.concurrent_trees=36",
    "learner.minibatches=2",
    "metrics.tensorboard=false",
)
VALIDATION = (
    # larger batches learn more in a step: 32 steps of them are 42 of these
    Cell("ahead", ("replay.max_staleness=2", "replay.prompts_per_batch=8", "steps=44")),
    # a step of a synchronous run varies by half, with how many trees are replaced one after the other
    Cell("synchronous", ("replay.max_staleness=0", "replay.prompts_per_batch=8", "steps=32")),
    Cell("large", ("replay.max_staleness=1", "replay.prompts_per_batch=16", "steps=32")),
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
    seed: int
    """Of the runs of `validate`."""
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
    if "validate" in values and values.keys() - {"validate", "seed"}:
        raise ConfigError("validate=DIR goes with seed=N alone")
    seed = values.get("seed", EXAMPLES["seed"])
    if not (seed.isascii() and seed.isdigit()):
        raise ConfigError(f"seed={seed} is not a whole number from 0")
    if "seed" in values and "validate" not in values:
        raise ConfigError(f"seed={seed} goes with validate=DIR alone")
    sizes = values.get("actors", ",".join(map(str, sim_scale.SIZES))).split(",")
    if not all(size.isdecimal() and int(size) and not int(size) % sim_scale.UNIT for size in sizes):
        raise ConfigError(
            f"actors={','.join(sizes)} must be multiples of {sim_scale.UNIT}, the actors of an engine"
        )
    return SimOptions(
        calibrate=Path(values["calibrate"]) if "calibrate" in values else None,
        predict=tuple(map(Path, values.get("predict", "").split(","))),
        validate=Path(values["validate"]) if "validate" in values else None,
        seed=int(seed),
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
        say(validated(options.validate, options.seed, run, say))
    elif options.calibrate is not None:
        say(compared(options.calibrate, options.predict))
    else:
        say(sim_scale.write(sim_scale.simulate(say, options.actors), options.out))


def validated(folder: Path, seed: int, run: Run, say: Callable[[str], None]) -> str:
    """Make the runs that are missing; calibrate on the first, predict the others. Gives the table, also written."""
    make_runs(folder, seed, run, say)
    first, *others = (folder / cell.label for cell in VALIDATION)
    text = compared(first, others)
    (folder / "table.md").write_text(text)
    return text


def make_runs(folder: Path, seed: int, run: Run, say: Callable[[str], None]) -> None:
    """Those of the validation that are not there, or were stopped.

    Raises:
        ConfigError: a run with other keys is there, one whose keys nobody noted, or one that is at work.
        TreepoError: a run failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine.note(folder / "environment.json")
    for cell in VALIDATION:
        keys = (*COMMON, f"seed={seed}")
        _remove_unfinished(folder / cell.label, (*keys, *cell.keys))
        done = finish(cell, keys, folder, lambda keys, log: run(keys, log, RUN_S))
        say(f"{cell.label}: {done.words}")


def compared(first: Path, others: Sequence[Path]) -> str:
    """Calibrate on a run and predict others. Gives the table."""
    run = read_real_run(first)
    settings = calibrate(run)
    return table(run, settings, [predict(settings, read_real_run(other)) for other in others])


def _remove_unfinished(folder: Path, keys: tuple[str, ...]) -> None:
    """A run that is gone on with was timed in parts, each with a cold start: it is begun again.

    One with other keys is left for `attempt` to refuse.

    Raises:
        ConfigError: a run is there whose keys nobody noted, or one that is at work.
    """
    if not (folder / CONFIG_FILE).is_file():
        return
    state = read_state(folder)
    if state is None:
        raise ConfigError(
            f"{folder} holds a run, and {folder.name}.{STATE_FILE} beside it, which has its keys, is not there; "
            "put that back, move the folder away, or name another validate=DIR"
        )
    if state.keys != keys or (state.code == 0 and is_finished(folder)):
        return
    with held(folder):
        for path in folder.iterdir():
            if path.name != LOCK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
