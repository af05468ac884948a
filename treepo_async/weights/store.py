"""The folder of publications: one write-once folder per policy version, the newest few kept.

A publication appears by one rename and goes by one, so a folder that is listed is complete.
"""

import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import TensorSpec, serialize_file

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import (
    WEIGHTS_FILE,
    Manifest,
    Probe,
    TensorInfo,
    hash_bytes,
)

VERSION_NAME = re.compile(r"\d+\.\d+")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class NamedTensor(NamedTuple):
    """A tensor as bytes, row-major."""

    name: str
    info: TensorInfo
    data: bytes


Apart = Callable[[Callable[[], None]], None]
"""Does a piece of work, and whatever must go on meanwhile."""


def at_once(work: Callable[[], None]) -> None:
    """Do it, with nothing else meanwhile."""
    work()


class WeightStore:
    """Publications under one folder."""

    def __init__(self, folder: Path, *, keep: int, keep_marked: int = 0) -> None:
        """Open or create.

        Args:
            folder: of all publications.
            keep: newest publications that are kept.
            keep_marked: newest of those to be evaluated that are kept besides.
        """
        self.folder = folder
        self._keep, self._keep_marked = keep, keep_marked
        folder.mkdir(parents=True, exist_ok=True)

    def publish(
        self,
        version: PolicyVersion,
        tensors: Iterable[NamedTensor],
        *,
        config_file: Path,
        probe: Probe,
        evaluate: bool,
        apart: Apart = at_once,
    ) -> Path:
        """Write a publication and remove those that are too old. Gives its folder.

        Args:
            version: of the weights.
            tensors: all of them.
            config_file: the model's `config.json`.
            probe: proves that an engine has them.
            evaluate: whether the version shall be evaluated.
            apart: how to do what needs no more tensors and may take long.

        Raises:
            WeightsError: the version is published already.
        """
        if self.path(version).exists():
            raise WeightsError(f"{self.path(version)} is published already and never rewritten")
        remove_leftovers(self.folder)
        temporary = self.folder / f".{version}"
        temporary.mkdir()
        shutil.copy(config_file, temporary / "config.json")
        held = list(tensors)

        def write() -> None:
            write_tensors(temporary / WEIGHTS_FILE, held)
            Manifest(
                version=str(version),
                tensors={t.name: t.info for t in held},
                hashes={t.name: hash_bytes(t.data) for t in held},
                probe=probe,
                evaluate=evaluate,
            ).write(temporary)
            temporary.rename(self.path(version))
            self._remove_old()

        apart(write)
        return self.path(version)

    def path(self, version: PolicyVersion) -> Path:
        """The folder of a version."""
        return self.folder / str(version)

    def versions(self) -> list[PolicyVersion]:
        """Published versions, oldest first."""
        return versions_in(self.folder)

    def next_after(
        self,
        applied: PolicyVersion,
        *,
        without: Collection[PolicyVersion] = (),
        marked_only: bool = False,
    ) -> PolicyVersion | None:
        """The version to apply next: the newest one not in `without`, but none to be evaluated is passed over.

        Nor is one without a readable manifest: `verify` refuses it by name. With `marked_only` others than these never
        come next.
        """
        newer = [v for v in self.versions() if v > applied and v not in without]
        for version in newer:
            if self._must_be_seen(version):
                return version
        return newer[-1] if newer and not marked_only else None

    def _must_be_seen(self, version: PolicyVersion) -> bool:
        try:
            return Manifest.read(self.path(version)).evaluate
        except WeightsError:
            return True

    def _remove_old(self) -> None:
        old = self.versions()[: -self._keep]
        marked = [v for v in old if self._must_be_seen(v)] if self._keep_marked else []
        spared = marked[-self._keep_marked :]
        for version in old:
            if version in spared:
                continue
            hidden = self.folder / f".old-{version}"
            self.path(version).rename(hidden)
            shutil.rmtree(hidden)


def versions_in(folder: Path) -> list[PolicyVersion]:
    """The versions that folders are named after, ascending; other names are somebody else's."""
    names = (entry.name for entry in folder.iterdir())
    return sorted(PolicyVersion.parse(name) for name in names if VERSION_NAME.fullmatch(name))


def remove_leftovers(folder: Path) -> None:
    """Remove what a writer that was killed left half written or half removed; only for the one writer."""
    for entry in folder.glob(".*"):
        if entry.is_dir():
            shutil.rmtree(entry)


def write_tensors(file: Path, tensors: Sequence[NamedTensor]) -> None:
    """Write a safetensors file."""
    specs = {tensor.name: _spec(tensor) for tensor in tensors}
    serialize_file(specs, str(file), {"format": "pt"})


def _spec(tensor: NamedTensor) -> TensorSpec:
    """Points into `tensor.data`, which must outlive it."""
    pointer = np.frombuffer(tensor.data, dtype=np.uint8).ctypes.data
    return TensorSpec(
        dtype=_DTYPES[tensor.info.dtype],
        shape=list(tensor.info.shape),
        data_ptr=pointer,
        data_len=len(tensor.data),
    )
