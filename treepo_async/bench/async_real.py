"""A cell of the real back end: `launch/run.py` as a person starts it, with the keys of the arm, and its folder read afterwards.

Waits: for the run's end (deadline `START_S` and `MOST_STEP_S` for each step; the run has its own for every wait inside).
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from treepo_async.bench.async_arms import ArmSettings
from treepo_async.bench.async_read import read_run
from treepo_async.bench.async_rows import Arm, CellData
from treepo_async.bench.cell_runs import launch
from treepo_async.errors import TreepoError

START_S = 300.0
MOST_STEP_S = 60.0


def keys_of(
    settings: ArmSettings,
    *,
    seed: int,
    steps: int,
    run_dir: Path,
    more: Sequence[str],
    actor_core: int = 0,
) -> list[str]:
    """The words of a run; evaluated before the first step and after the last one, when nothing is timed.

    `steps` are all it makes, those behind the last that counts included.
    """
    return [
        f"seed={seed}",
        f"steps={steps}",
        f"run_dir={run_dir}",
        f"eval.every={steps}",
        *more,
        *settings.keys(actor_core),
    ]


def run_cell(
    arm: Arm, words: Sequence[str], run_dir: Path, *, seed: int, warm_up: int, last: int
) -> CellData:
    """Run, and read the folder. What an earlier try left there is removed: a run gone on with is none that can be timed.

    Steps count behind `warm_up`, up to `last`.

    Raises:
        TreepoError: the run failed, or did not end in time.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True)
    steps = next(int(word.partition("=")[2]) for word in words if word.startswith("steps="))
    log_file = run_dir.with_name(f"{run_dir.name}.log")
    code = launch(words, log_file, START_S + MOST_STEP_S * steps)
    if code != 0:
        words_said = log_file.read_text(errors="replace")[-1500:]
        raise TreepoError(f"{arm} seed {seed}: the run ended with {code}: {words_said}")
    return read_run(run_dir, arm=arm, seed=seed, warm_up=warm_up, last=last)
