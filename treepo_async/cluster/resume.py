"""Where a run folder stands: new, or to be gone on with from its newest checkpoint. Neighbour: `config.run_lock` says who is in it."""

import shutil
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

from treepo_async.config.command_line import load, parse
from treepo_async.config.schema import Config, knobs
from treepo_async.config.wiring import CONFIG_FILE, POLICY_FILE
from treepo_async.errors import ConfigError, WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore
from treepo_async.weights.store import versions_in

FIXED = ("seed", "model.", "data.", "replay.prompts_per_batch")
"""Keys, and beginnings of keys, that a run keeps for good: its place in the data depends on them."""
FREE = ("data.epochs",)
"""Exceptions: more of the same data comes behind what there was."""
LINEAGE_FILE = "lineage"
"""In a run's folder: the highest lineage that a driver has given out."""


def parse_resumed(words: Sequence[str]) -> Config:
    """The config of the words, on top of the config of the run that `run_dir` holds, if it holds one.

    Raises:
        ConfigError: as `parse`; or `resume=false` and the folder holds a run; or a key was changed that a run keeps.
    """
    config = parse(words)
    saved_file = Path(config.run_dir or "") / CONFIG_FILE
    if config.run_dir is None or not saved_file.is_file():
        return config
    if not config.resume:
        raise ConfigError(
            f"run_dir={config.run_dir} holds a run already, and resume=false; name another folder"
        )
    resumed, saved = parse([f"config={saved_file}", *words]), load(saved_file)
    changed = [
        f"{key}={attrgetter(key)(resumed)} was {attrgetter(key)(saved)}"
        for key, _ in knobs(Config)
        if key.startswith(FIXED)
        and key not in FREE
        and attrgetter(key)(resumed) != attrgetter(key)(saved)
    ]
    if changed:
        raise ConfigError(
            f"run_dir={config.run_dir} holds a run that cannot be gone on with otherwise: "
            f"{'; '.join(changed)}; leave it as it was, or name another folder"
        )
    return resumed


def find_resume_version(run_dir: Path, num_steps: int) -> PolicyVersion | None:
    """The version of the newest whole checkpoint of a run; None when it has made none yet.

    Raises:
        ConfigError: the run has all its steps and its model, or none of its checkpoints is whole.
    """
    damaged: list[WeightsError] = []
    checkpoints = CheckpointStore(run_dir / "checkpoints", keep=1)
    newest = checkpoints.newest(damaged.append)
    if newest is None and damaged:
        raise ConfigError(f"run_dir={run_dir}: no checkpoint is whole: {damaged[0]}")
    if newest is None:
        return None
    version = newest.state.policy_version
    if version.step >= num_steps and _has_model(run_dir, version):
        raise ConfigError(
            f"run_dir={run_dir} has done its {version.step} steps; give steps=N for more, or name another folder"
        )
    return version


def _has_model(run_dir: Path, version: PolicyVersion) -> bool:
    """Whether the run left the model of a version as its last act; it may have been killed before that."""
    file = run_dir / "model" / POLICY_FILE
    return file.is_file() and PolicyVersion.parse(file.read_text().strip()).step >= version.step


def take_lineage(run_dir: Path) -> int:
    """A lineage that no weights of the run have had, noted so that nobody gets it again; 0 for a new run.

    To be called before `clear_for_resume`, which removes traces of those that were used.
    """
    file = run_dir / LINEAGE_FILE
    used = [int(file.read_text())] if file.is_file() else []
    for folder in (run_dir / "weights", run_dir / "checkpoints"):
        if folder.is_dir():
            used += [version.lineage for version in versions_in(folder)]
    lineage = max(used, default=-1) + 1
    temporary = file.with_name(f".{LINEAGE_FILE}")
    temporary.write_text(str(lineage))
    temporary.replace(file)
    return lineage


def clear_for_resume(run_dir: Path) -> None:
    """Remove what processes of the run left for each other and the resumed run must not see.

    What replay has stays, also where there is no checkpoint: the run then goes on at step 0 with the same trees.
    """
    shutil.rmtree(run_dir / "weights", ignore_errors=True)
