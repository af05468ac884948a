"""Cells that are real runs, each in a folder of its own that says how far it is. Neighbours: `sweep`, and `sim` with `validate=`.

    no folder -> run -> done          a finished cell is not run again
                  `-> broken          the same keys go on with it (`run_dir`, `resume`); its reason is kept beside it

The keys of a cell are noted before its run begins, so one that was stopped midway is gone on with by the same keys alone.

A cell is finished when its folder holds the model that a run leaves at its end. Waits: for the run (`launch`; the caller gives the
deadline).
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from treepo_async.errors import ConfigError, TreepoError
from treepo_async.process import run_child

STATE_FILE = "cell.json"
FINISHED = Path("model") / "policy_version"
"""In a run's folder once it has come to its end."""
STOPPED = "stopped"
"""Reason of a cell whose run was not waited for to its end."""
STOP_S = 30.0
LAST_WORDS = 400
"""Characters of the output of a failed run."""

_LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "run.py"

Launch = Callable[[Sequence[str], Path], int]
"""Makes a real run: keys and the file for its output; gives the exit code."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A run to make."""

    label: str
    """Name of its folder."""
    keys: tuple[str, ...]
    """Beside those that all cells have."""


@dataclass(frozen=True, slots=True)
class CellState:
    """How a cell ended."""

    keys: tuple[str, ...]
    """All of them but `run_dir`."""
    code: int
    """Of the run's process; 0 for one that finished, -1 where there is none: it is being run, was stopped, or came to no end."""
    seconds: float
    """Of the last attempt."""
    attempts: int
    reason: str = ""
    """The end of its output, if it failed."""

    @property
    def words(self) -> str:
        """For a reader."""
        if self.code == 0:
            return f"done in {self.seconds:.0f} s"
        return f"failed with {self.code} after {self.seconds:.0f} s: {self.reason.strip()[-200:]}"


def launch(keys: Sequence[str], log_file: Path, timeout_s: float) -> int:
    """Run `launch/run.py` as a person does. Gives its exit code, -1 if it did not end in time."""
    command = [sys.executable, str(_LAUNCH), *keys]
    return run_child(command, log_file=log_file, timeout_s=timeout_s, stop_s=STOP_S)


def is_finished(folder: Path) -> bool:
    """Whether the run in a folder came to its end."""
    return (folder / FINISHED).is_file()


def read_state(folder: Path) -> CellState | None:
    """How the cell of a run's folder ended; None where it was not tried."""
    file = _state_file(folder)
    if not file.is_file():
        return None
    values = json.loads(file.read_text())
    return CellState(**values | {"keys": tuple(values["keys"])})


def attempt(cell: Cell, common: Sequence[str], out: Path, launch: Launch) -> CellState:
    """Run a cell, or go on with it; one that is finished is left alone. Gives how it ended.

    Raises:
        ConfigError: its folder holds a run with other keys.
    """
    folder = out / cell.label
    keys = (*common, *cell.keys)
    before = read_state(folder)
    if before is not None and before.keys != keys:
        raise ConfigError(
            f"{folder} holds a run with {' '.join(before.keys)}, not with {' '.join(keys)}; take another out= or label"
        )
    if before is not None and before.code == 0 and is_finished(folder):
        return before
    log = out / f"{cell.label}.log"
    begun = CellState(keys, -1, 0.0, 1 + (before.attempts if before else 0), STOPPED)
    _write_state(folder, begun)
    began = time.monotonic()
    code = launch([*keys, f"run_dir={folder}"], log)
    if code == 0 and not is_finished(folder):
        code = -1
    state = replace(
        begun,
        code=code,
        seconds=round(time.monotonic() - began, 1),
        reason="" if code == 0 else _last_words(log),
    )
    _write_state(folder, state)
    return state


def finish(cell: Cell, common: Sequence[str], out: Path, launch: Launch) -> CellState:
    """`attempt`, where a failure is one.

    Raises:
        TreepoError: the run failed.
    """
    state = attempt(cell, common, out, launch)
    if state.code:
        raise TreepoError(f"{out / cell.label} {state.words}; its output is in {cell.label}.log")
    return state


def _write_state(folder: Path, state: CellState) -> None:
    """It is there whole, or as it was."""
    file = _state_file(folder)
    rough = file.with_suffix(".rough")
    rough.write_text(json.dumps(asdict(state), indent=1))
    rough.replace(file)


def _state_file(folder: Path) -> Path:
    """Beside the run's folder, whose content is the run's."""
    return folder.with_name(f"{folder.name}.{STATE_FILE}")


def _last_words(log: Path) -> str:
    return log.read_text(errors="replace")[-LAST_WORDS:] if log.is_file() else ""
