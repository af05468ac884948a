"""Many runs with one command: `bench.py sweep KEY=VALUE,VALUE ... out=DIR [keys="KEY=VALUE ..."] [warm=tiny] [url=URL] [ray=ADDRESS]`.

    grid -> cells, the last key varying fastest -> attempt each (`cell_runs`) -> index.csv after each

A cell that is finished is skipped, a broken one gone on with; one that fails is kept with its reason, and the sweep goes on. A value
that holds commas is written in brackets. `keys` are of every cell. With `url` all cells use SGLang servers that run already
(`engine.url`), with `warm` one that is started for the sweep (`sweep_warm`), with `ray` one Ray cluster (`cluster.ray_address`):
these stay warm between cells, and each run loads and proves its initial weights in them; the other processes are a cell's
own. Waits: for each run, until it has ended (`RUN_S`).
"""

import csv
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.bench import machine
from treepo_async.bench.cell_runs import Cell, CellState, attempt, is_finished, read_state
from treepo_async.errors import ConfigError, TreepoError

RUN_S = 24 * 3600.0
OWN = ("out", "keys", "warm", "url", "ray")
WARM_MODELS = ("tiny",)
_NOT_IN_NAMES = str.maketrans({"/": "_", " ": "_", ":": "_"})


@dataclass(frozen=True, slots=True)
class Sweep:
    """What is asked for."""

    cells: tuple[Cell, ...]
    common: tuple[str, ...]
    """Keys of every cell."""
    out: Path
    warm: tuple[str, ...] = ()
    """Keys of what is used by all cells, which does not make another run of one."""
    model: str = ""
    """Built-in model for which a server is started; nothing: none is."""


def parse(words: Sequence[str]) -> Sweep:
    """Read the grid.

    Raises:
        ConfigError: a word that is no KEY=VALUE,..., a key twice, or no out=DIR.
    """
    values = dict[str, str]()
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals and value):
            raise ConfigError(
                f"{word!r} is not KEY=VALUE,VALUE..., e.g. replay.max_staleness=0,2,8"
            )
        if key in values:
            raise ConfigError(f"{key} is given twice; write its values as {key}=A,B")
        values[key] = value
    own = {key: values.pop(key) for key in OWN if key in values}
    if "out" not in own:
        raise ConfigError("out=DIR is missing: the folder of the runs")
    if not values:
        raise ConfigError("no grid is given, e.g. replay.max_staleness=0,2,8 seed=0,1,2")
    model = own.get("warm", "")
    if model and (model not in WARM_MODELS or "url" in own):
        raise ConfigError(f"warm={model} is one of {', '.join(WARM_MODELS)}, and goes without url")
    places = {"url": "engine.url", "ray": "cluster.ray_address"}
    warm = [f"{key}={own[word]}" for word, key in places.items() if word in own]
    common = own.get("keys", "").split()
    return Sweep(tuple(cells_of(values)), tuple(common), Path(own["out"]), tuple(warm), model)


def cells_of(grid: dict[str, str]) -> list[Cell]:
    """A cell for each combination of the values of each key.

    Raises:
        ConfigError: two cells have one label.
    """
    axes = [[(key, value) for value in _values(text)] for key, text in grid.items()]
    cells = [
        Cell(_label(pairs), tuple(f"{key}={value}" for key, value in pairs))
        for pairs in itertools.product(*axes)
    ]
    labels = [cell.label for cell in cells]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(
            f"two cells are called {twice}; do two keys end alike, or is a value twice?"
        )
    return cells


def run(
    sweep: Sweep, launch: Callable[[Sequence[str], Path, float], int], say: Callable[[str], None]
) -> None:
    """Make every run that is not finished.

    Raises:
        ConfigError: a folder holds a run with other keys.
        TreepoError: cells failed; the others are done.
    """
    sweep.out.mkdir(parents=True, exist_ok=True)
    machine.note(sweep.out / "environment.json", cells=[cell.label for cell in sweep.cells])
    states = list[CellState]()
    seconds = list[float]()
    for number, cell in enumerate(sweep.cells, start=1):
        was_done = is_finished(sweep.out / cell.label)
        state = attempt(
            cell,
            sweep.common,
            sweep.out,
            lambda keys, log: launch([*keys, *sweep.warm], log, RUN_S),
        )
        states.append(state)
        if not was_done:
            seconds.append(state.seconds)
        left = sum(not is_finished(sweep.out / later.label) for later in sweep.cells[number:])
        say(f"[{number}/{len(sweep.cells)}] {cell.label}: {state.words}{_estimate(seconds, left)}")
        write_index(sweep)
    failed = [c.label for c, s in zip(sweep.cells, states, strict=True) if s.code]
    if failed:
        raise TreepoError(
            f"{len(failed)} of {len(sweep.cells)} cells failed: {', '.join(failed)}; see {sweep.out / 'index.csv'}; "
            "the same command tries them again"
        )


def write_index(sweep: Sweep) -> None:
    """Write `index.csv`: a row a cell, with its keys and how it ended."""
    keys = list(dict.fromkeys(word.partition("=")[0] for c in sweep.cells for word in c.keys))
    with (sweep.out / "index.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["label", *keys, "state", "seconds", "attempts", "reason"])
        for cell in sweep.cells:
            values = dict(word.split("=", 1) for word in cell.keys)
            state = read_state(sweep.out / cell.label)
            rows.writerow([cell.label, *(values.get(key, "") for key in keys), *_ending(state)])


def _ending(state: CellState | None) -> list[object]:
    if state is None:
        return ["missing", "", 0, ""]
    name = "failed" if state.code else "done"
    return [name, state.seconds, state.attempts, state.reason]


def _estimate(seconds: Sequence[float], left: int) -> str:
    if not (seconds and left):
        return ""
    rest = statistics.median(seconds) * left
    return f"; {left} left, about {rest / 60:.0f} min"


def _values(text: str) -> list[str]:
    """Between commas outside of brackets."""
    values, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            values.append("")
        else:
            values[-1] += letter
    return values


def _label(pairs: Sequence[tuple[str, str]]) -> str:
    """E.g. `max_staleness=2-seed=0`."""
    parts = (f"{key.rpartition('.')[2]}={value}" for key, value in pairs)
    return "-".join(parts).translate(_NOT_IN_NAMES)
