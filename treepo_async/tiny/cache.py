"""The tiny models on disk: trained once per task, recipe, architecture and seed, then reused.

The folder's name is a hash of everything that decides the weights. A folder is built under a temporary name
and published by one rename, so whatever stands under the final name is complete.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from treepo_async.config.schema import TINY
from treepo_async.tiny.built_in import BUILT_INS, BuiltIn
from treepo_async.tiny.recipe import DEFAULT_ARCHITECTURE, Architecture
from treepo_async.tiny.tokenizer import build_tokenizer, save_tokenizer

FORMAT_VERSION = 1
"""Raise it when the folder's files change without any of the hashed inputs changing."""

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "warm_start.json",
)
_NUM_HASHED_DEMONSTRATIONS = 32


def prepare(
    cache_dir: Path,
    seed: int,
    report: Callable[[int, int, float], None] | None = None,
    built_in: BuiltIn = BUILT_INS[TINY],
    architecture: Architecture = DEFAULT_ARCHITECTURE,
) -> Path:
    """The folder of the warm-started model, trained first if it is not there yet.

    Args:
        cache_dir: created if missing; several processes may share it.
        seed: decides the initial weights and the demonstrations.
        report: called after every training step with the step (from 1), the number of steps and the loss.
        built_in: the task, and how to train on it.
        architecture: what to train.

    Returns:
        A Hugging Face model folder, `cache_dir/<name>-<hash>`.
    """
    folder = cache_dir / f"{built_in.name}-{content_hash(built_in, architecture, seed)}"
    if _is_complete(folder):
        return folder
    building = cache_dir / f".{folder.name}.{secrets.token_hex(8)}"
    building.mkdir(parents=True)
    try:
        _build(building, built_in, architecture, seed, report)
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def content_hash(built_in: BuiltIn, architecture: Architecture, seed: int) -> str:
    """Sixteen hex digits over everything that decides the folder's content.

    The task enters through demonstrations drawn from it, so a changed rule gives a new folder without
    anybody having to remember a version.
    """
    recipe, demonstration = built_in.recipe, built_in.task.demonstration
    quality = {"p_hurried": recipe.p_hurried, "p_slip": recipe.p_slip}
    indices = range(_NUM_HASHED_DEMONSTRATIONS)
    content = {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "recipe": asdict(recipe),
        "architecture": asdict(architecture),
        "task": [asdict(demonstration(seed, index, **quality)) for index in indices],
        "tokenizer": build_tokenizer().to_str(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _build(
    folder: Path,
    built_in: BuiltIn,
    architecture: Architecture,
    seed: int,
    report: Callable[[int, int, float], None] | None,
) -> None:
    with _threads_that_sleep():
        # here, so that a run whose model is cached never imports torch for it
        from treepo_async.tiny.model import save_model
        from treepo_async.tiny.warm_start import warm_start

    model, loss = warm_start(built_in, architecture, seed, report)
    save_model(model, architecture, folder)
    save_tokenizer(folder, architecture.max_position_embeddings)
    summary = {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "recipe": asdict(built_in.recipe),
        "architecture": asdict(architecture),
        "final_loss": loss,
    }
    (folder / "warm_start.json").write_text(json.dumps(summary, indent=2) + "\n")
    for name in _FILES:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


@contextmanager
def _threads_that_sleep() -> Iterator[None]:
    """Let OpenMP, as it is loaded, make its threads sleep while they wait.

    Where others want the cores too, threads that spin took 7 to 11 s for 50 steps instead of 3 s.
    """
    name = "OMP_WAIT_POLICY"
    before = os.environ.get(name)
    os.environ.setdefault(name, "PASSIVE")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _publish(building: Path, folder: Path) -> None:
    """Give `building` its final name, unless another process was faster."""
    if folder.exists() and not _is_complete(folder):
        # a copy that somebody broke; moved first, so that nobody meets it half deleted
        broken = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
        with suppress(FileNotFoundError):
            folder.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    try:
        building.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise
