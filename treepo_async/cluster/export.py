"""From a run's folder to a Hugging Face folder of what it has trained; neither Megatron nor a GPU is needed.

Neighbours: `weights.export` writes the folder, `resume` goes on from the same checkpoints, `launch/export.py` is the command.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from treepo_async.cluster.memory import model_parameters
from treepo_async.cluster.model_files import find_files, has_tokenizer
from treepo_async.cluster.prepare import load_model_config
from treepo_async.config.command_line import load
from treepo_async.config.schema import Config
from treepo_async.config.wiring import CONFIG_FILE, POLICY_FILE
from treepo_async.errors import ConfigError, WeightsError
from treepo_async.learner.shape import ModelShape
from treepo_async.weights.checkpoints import WEIGHTS_KIND, Checkpoint, CheckpointStore, file_of
from treepo_async.weights.export import DTYPES, Exported, export
from treepo_async.weights.manifest import read_tensors

USAGE = "RUN hf=DIR [step=N] [dtype=float32|bfloat16] [model=DIR]"


@dataclass(frozen=True, slots=True)
class ExportJob:
    """What shall be exported."""

    run: Path
    hf: Path
    """Folder to write, not there yet."""
    step: int | None = None
    """Policy step of the checkpoint; None: the newest whole one."""
    dtype: str | None = None
    """Of the exported weights; None: that of the run."""
    model: Path | None = None
    """Folder with config.json and tokenizer; None: as the run's config names it."""

    @classmethod
    def parse(cls, words: Sequence[str]) -> Self:
        """Read the command line's words.

        Raises:
            ConfigError: a word that is not understood, or one that is missing.
        """
        runs = [word for word in words if "=" not in word]
        keys = dict(word.split("=", 1) for word in words if "=" in word)
        known = [field.name for field in fields(cls)][1:]
        for key in keys:
            if key not in known:
                raise ConfigError(f"unknown key {key}; the keys are {', '.join(known)}")
        if len(runs) != 1 or not keys.get("hf"):
            raise ConfigError(f"give the folder of one run, and hf=DIR: {USAGE}")
        step, dtype, model = (keys.get(key) for key in ("step", "dtype", "model"))
        if step is not None and not step.isdecimal():
            raise ConfigError(f"step={step} is no policy step, e.g. step=40")
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype} is not one of {', '.join(DTYPES)}")
        return cls(
            run=Path(runs[0]),
            hf=Path(keys["hf"]),
            step=None if step is None else int(step),
            dtype=dtype,
            model=None if model is None else Path(model),
        )


def export_run(
    job: ExportJob, *, say: Callable[[str], None], report: Callable[[int, int, float], None]
) -> Exported:
    """Export a checkpoint of a run.

    Args:
        job: what.
        say: is told of each checkpoint that is passed over, being damaged or removed meanwhile.
        report: see `prepare_model`; only a built-in model that is no longer cached takes long.

    Raises:
        ConfigError: the folder is no run, there is no checkpoint to export, or the target is there already.
        WeightsError: the weights of no checkpoint, or not of the one that was asked for, are whole.
        OSError: the folder cannot be written.
    """
    if not (job.run / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{job.run} has no {CONFIG_FILE}, so it is no run; give the folder that a run names as run_dir"
        )
    if job.hf.exists():
        raise ConfigError(
            f"hf={job.hf} is there already and never overwritten; name another folder"
        )
    config = load(job.run / CONFIG_FILE)
    model_dir: Path | None = None
    while True:
        checkpoint = _choose(job, say)
        model_dir = model_dir or _model_dir(job, config, report)
        try:
            _check_model(checkpoint, model_dir)
            return export(checkpoint, model_dir, job.hf, dtype=job.dtype or config.model.dtype)
        except (OSError, WeightsError):
            if checkpoint.folder.exists():
                raise
        # the run is at work and keeps newer ones: the next is among them
        say(f"passed over: {checkpoint.folder} was removed while it was read")


def _choose(job: ExportJob, say: Callable[[str], None]) -> Checkpoint:
    store = CheckpointStore(job.run / "checkpoints", keep=1)
    versions = store.versions()
    if not versions:
        raise ConfigError(
            f"{job.run} has no checkpoint yet; the first comes at step checkpoint.every"
        )
    if job.step is not None:
        wanted = [version for version in versions if version.step == job.step]
        if not wanted:
            there = ", ".join(sorted({str(version.step) for version in versions}, key=int))
            raise ConfigError(f"step={job.step}: {job.run} has checkpoints of steps {there}")
        return store.at(wanted[-1], kinds=[WEIGHTS_KIND])
    damaged: list[WeightsError] = []
    newest = store.newest(damaged.append, kinds=[WEIGHTS_KIND])
    for error in damaged:
        say(f"passed over: {error}")
    if newest is None:
        raise WeightsError(f"{job.run}: none of its {len(versions)} checkpoints is whole")
    return newest


def _model_dir(job: ExportJob, config: Config, report: Callable[[int, int, float], None]) -> Path:
    """Where config.json and tokenizer are: as asked for, in the run's own model, or in the one it began with."""
    trained = job.run / "model"
    if job.model is not None:
        folder = job.model
    elif (trained / POLICY_FILE).is_file():
        folder = trained
    else:
        folder = find_files(
            config.model.path, cache_dir=Path(config.cache_dir), seed=config.seed, report=report
        )
    if not (folder / "config.json").is_file() or not has_tokenizer(folder):
        raise ConfigError(
            f"{folder} lacks config.json or tokenizer.json; give model=DIR, the model that the run began with"
        )
    return folder


def _check_model(checkpoint: Checkpoint, model_dir: Path) -> None:
    """Refuse a config.json of another model than the weights are of."""
    tensors = read_tensors(checkpoint.folder / file_of(WEIGHTS_KIND))
    found = sum(math.prod(info.shape) for info in tensors.values())
    promised = model_parameters(ModelShape.from_config(load_model_config(model_dir)))
    if found != promised:
        raise ConfigError(
            f"{model_dir} is of a model of {promised:,} parameters, {checkpoint.folder} has {found:,}; give model=DIR, "
            "the model that the run began with"
        )
