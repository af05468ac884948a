"""The folder of publications: one write-once folder per policy version, the newest few kept.

A publication appears by one rename and goes by one, so a folder that is listed is complete. A writer whose lineage has been
followed by a later one is refused. What cannot be removed is told of and tried again with the next publication; it fails
none.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from treepo_async import chaos
from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.durable import spared
from treepo_async.weights.manifest import (
    NUM_THREADS,
    WEIGHTS_FILE,
    Manifest,
    Probe,
    TensorInfo,
    hash_bytes,
)
from treepo_async.weights.tensor_file import head_of, num_bytes

VERSION_NAME = re.compile(r"\d+\.\d+")


class NamedTensor(NamedTuple):
    """A tensor as bytes, row-major; they may be those of the model itself."""

    name: str
    info: TensorInfo
    data: bytes | memoryview


Unremoved = Callable[[OSError], None]
"""Is told of what is too old or left over and cannot be removed."""

Apart = Callable[[Callable[[], None]], None]
"""Does a piece of work, and whatever must go on meanwhile."""


def at_once(work: Callable[[], None]) -> None:
    """Do it, with nothing else meanwhile."""
    work()


class WeightStore:
    """Publications under one folder."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_marked: int = 0,
        unremoved: Unremoved = lambda _: None,
    ) -> None:
        """Open or create.

        Args:
            folder: of all publications.
            keep: newest publications that are kept.
            keep_marked: newest of those to be evaluated that are kept besides.
            unremoved: see `Unremoved`.
        """
        self._unremoved = unremoved
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
        published_at: float = 0.0,
    ) -> Path:
        """Write a publication and remove those that are too old. Gives its folder.

        Args:
            version: of the weights.
            tensors: all of them; their bytes are read until this returns.
            config_file: the model's `config.json`.
            probe: proves that an engine has them.
            evaluate: whether the version shall be evaluated.
            apart: how to do what needs no more tensors and may take long.
            published_at: see `Manifest`.

        Raises:
            WeightsError: the version is published already, or one of a later lineage is.
        """
        temporary = self._begin(version)
        shutil.copy(config_file, temporary / "config.json")
        held = list(tensors)

        def write() -> None:
            hashes = write_tensors(temporary / WEIGHTS_FILE, held)
            manifest = Manifest(
                version=str(version),
                tensors={t.name: t.info for t in held},
                hashes=hashes,
                probe=probe,
                evaluate=evaluate,
                published_at=published_at,
            )
            self._finish(version, temporary, manifest)

        apart(write)
        return self.path(version)

    def note(self, version: PolicyVersion, manifest: Manifest) -> Path:
        """Keep the manifest of a publication whose tensors go to the engines by another way. Gives its folder.

        Raises:
            WeightsError: as `publish`.
        """
        temporary = self._begin(version)
        self._finish(version, temporary, manifest)
        return self.path(version)

    def _begin(self, version: PolicyVersion) -> Path:
        """The hidden folder of a publication, once nothing speaks against it."""
        if self.path(version).exists():
            raise WeightsError(f"{self.path(version)} is published already and never rewritten")
        newest = max(self.versions(), default=version)
        if newest.lineage > version.lineage:
            raise WeightsError(
                f"{self.path(version)} is not published: lineage {version.lineage} was rolled back, {newest} is there"
            )
        with spared(self._unremoved):
            remove_leftovers(self.folder)
        temporary = self.folder / f".{version}"
        temporary.mkdir()
        return temporary

    def _finish(self, version: PolicyVersion, temporary: Path, manifest: Manifest) -> None:
        manifest.write(temporary)
        temporary.rename(self.path(version))
        # engines may have it: nothing from here on may fail the publication
        with spared(self._unremoved):
            self._remove_old()

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
        to_evaluate = marked[-self._keep_marked :]
        for version in old:
            if version in to_evaluate:
                continue
            with spared(self._unremoved):
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


def write_tensors(file: Path, tensors: Sequence[NamedTensor]) -> dict[str, str]:
    """Write a safetensors file, several tensors at a time. Gives the hash of each, taken from the bytes that were given, not from the file.

    Raises:
        WeightsError: a tensor has not the bytes that it says, or a name comes twice.
    """
    infos = {tensor.name: tensor.info for tensor in tensors}
    if len(infos) < len(tensors):
        raise WeightsError(
            f"{file}: of {len(tensors)} tensors only {len(infos)} have names of their own"
        )
    head, begins = head_of(infos)

    def write(number: int) -> str:
        tensor = tensors[number]
        if number == len(tensors) // 2:
            chaos.point("learner.mid_publish")
        if len(tensor.data) != num_bytes(tensor.info):
            raise WeightsError(
                f"{file}: tensor {tensor.name} has {len(tensor.data)} bytes, {tensor.info} has {num_bytes(tensor.info)}"
            )
        _write_at(out.fileno(), begins[number], tensor.data)
        return hash_bytes(tensor.data)

    with file.open("wb", buffering=0) as out, ThreadPoolExecutor(NUM_THREADS) as pool:
        hashes = list(pool.map(write, range(len(tensors))))
        # last: without it nobody takes the file for a whole one
        _write_at(out.fileno(), 0, head)
    return dict(zip(infos, hashes, strict=True))


def _write_at(descriptor: int, begin: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, begin)
        view, begin = view[written:], begin + written
