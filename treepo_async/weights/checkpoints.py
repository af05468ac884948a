"""The folder of checkpoints: one write-once folder per policy version, complete by one rename, the newest few kept.

A checkpoint is a set of safetensors files under Hugging Face's tensor names, one per kind (weights, and each moment of the
optimizer), so it can be loaded in any layout. Its manifest has the hash of every file; a damaged checkpoint is
passed over and the one before it is used. Neighbours: the learner writes and loads, the driver asks where a run stands.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import MANIFEST_FILE, UNREADABLE
from treepo_async.weights.store import (
    Apart,
    NamedTensor,
    at_once,
    remove_leftovers,
    versions_in,
    write_tensors,
)

HASH_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What a learner must know, beside its tensors, to go on."""

    version: str
    """Of the policy."""
    num_updates: int
    """Updates the optimizer made; a skipped one does not count."""
    layout: str
    """Of the learner that wrote it; any other one can load it."""
    rng: str
    """State of torch's CPU generator, hexadecimal."""
    probe_token_ids: list[list[int]]
    """Sequences with which a publication of these weights can be proven."""

    @property
    def policy_version(self) -> PolicyVersion:
        """`version`, parsed."""
        return PolicyVersion.parse(self.version)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path
    state: TrainingState
    hashes: dict[str, str]
    """By file name."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint's manifest.

        Raises:
            WeightsError: it is missing or no manifest of a checkpoint.
        """
        try:
            raw = json.loads((folder / MANIFEST_FILE).read_text())
            found = cls(folder, TrainingState(**raw["state"]), dict(raw["hashes"]))
            if found.state.version != folder.name:
                raise ValueError(f"it is of version {found.state.version}")
        except UNREADABLE as error:
            raise WeightsError(
                f"{folder / MANIFEST_FILE} is no manifest of a checkpoint: {error}"
            ) from error
        return found

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            WeightsError: a file is missing or damaged.
        """
        for name, expected in self.hashes.items():
            file = self.folder / name
            if not file.is_file():
                raise WeightsError(f"{file} is missing")
            if hash_file(file) != expected:
                raise WeightsError(f"{file} is damaged: its hash is not the manifest's")


class CheckpointStore:
    """Checkpoints under one folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """Open.

        Args:
            folder: of all checkpoints; made when the first one is written.
            keep: newest checkpoints that are kept.
        """
        self.folder = folder
        self._keep = keep

    def save(
        self,
        state: TrainingState,
        kinds: Iterable[tuple[str, Iterable[NamedTensor]]],
        *,
        apart: Apart = at_once,
    ) -> Path:
        """Write a checkpoint durably and remove those that are too old. Gives its folder.

        Args:
            state: beside the tensors.
            kinds: (kind, its tensors) one after another; a kind is held in memory while it is written.
            apart: how to do what needs no more tensors and may take long.

        Raises:
            WeightsError: there is one of this version.
        """
        final, temporary = self.folder / state.version, self.folder / f".{state.version}"
        if final.exists():
            raise WeightsError(f"{final} is there already and never rewritten")
        remove_leftovers(self.folder)
        temporary.mkdir(parents=True)
        for kind, tensors in kinds:
            apart(partial(write_tensors, temporary / file_of(kind), list(tensors)))
        apart(partial(self._publish, state, temporary, final))
        return final

    def _publish(self, state: TrainingState, temporary: Path, final: Path) -> None:
        files = sorted(temporary.iterdir())
        manifest = {"state": asdict(state), "hashes": {f.name: hash_file(f) for f in files}}
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest))
        for path in [*files, temporary / MANIFEST_FILE, temporary]:
            _sync(path)
        temporary.rename(final)
        _sync(self.folder)
        self._remove_old()

    def newest(self, passed_over: Callable[[WeightsError], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None.

        Args:
            passed_over: is told of each newer one that is not.
        """
        for version in reversed(self.versions()):
            try:
                found = Checkpoint.read(self.folder / str(version))
                found.verify()
            except WeightsError as error:
                passed_over(error)
                continue
            return found
        return None

    def versions(self) -> list[PolicyVersion]:
        """Of all checkpoints, oldest first."""
        return versions_in(self.folder) if self.folder.is_dir() else []

    def _remove_old(self) -> None:
        for version in self.versions()[: -self._keep]:
            hidden = self.folder / f".old-{version}"
            (self.folder / str(version)).rename(hidden)
            shutil.rmtree(hidden)


def file_of(kind: str) -> str:
    """The file that holds a kind of tensors."""
    return f"{kind}.safetensors"


def hash_file(file: Path) -> str:
    """blake2b of a file's bytes."""
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as opened:
        while block := opened.read(HASH_BLOCK):
            found.update(block)
    return found.hexdigest()


def _sync(path: Path) -> None:
    """Have a file's or a folder's contents on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
