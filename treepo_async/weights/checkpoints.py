"""The folder of checkpoints: one write-once folder per policy version, complete by one rename, the newest few kept.

A checkpoint is a set of safetensors files under Hugging Face's tensor names, one per kind (weights, and each moment of the
optimizer), so it can be loaded in any layout. Its manifest has the hash of every file and of itself; a damaged checkpoint is
passed over and the one before it is used. Neighbours: the learner writes and loads, the driver asks where a run stands,
`export` reads.

Invariants: a checkpoint is written below a hidden name, on disk before it has its own, and never changed. One that is whole
is only removed when `keep` newer ones are. What cannot be removed is told of and tried again with the next save; it costs no
checkpoint.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Self

from treepo_async import chaos
from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.durable import make_folder, publish_folder, spared
from treepo_async.weights.manifest import MANIFEST_FILE, UNREADABLE
from treepo_async.weights.store import (
    Apart,
    NamedTensor,
    Unremoved,
    at_once,
    remove_leftovers,
    versions_in,
)
from treepo_async.weights.tensor_file import TensorFileWriter

WEIGHTS_KIND = "weights"
"""The kind of tensors that are the policy itself."""
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
    ancestry: dict[str, int] = field(default_factory=dict)
    """Lineage: last step at which its weights are those of the lineage that wrote this; see `learner.ancestry`."""

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
            WeightsError: it is missing, damaged or no manifest of a checkpoint.
        """
        try:
            raw = json.loads((folder / MANIFEST_FILE).read_text())
            if raw.pop("digest") != _digest(raw):
                raise ValueError("it is damaged: its digest is not that of its contents")
            found = cls(folder, TrainingState(**raw["state"]), dict(raw["hashes"]))
            if found.state.version != folder.name:
                raise ValueError(f"it is of version {found.state.version}")
        except UNREADABLE as error:
            raise WeightsError(
                f"{folder / MANIFEST_FILE} is no manifest of a checkpoint: {error}"
            ) from error
        return found

    def verify(self, kinds: Collection[str] | None = None) -> None:
        """Compare files with their hashes.

        Args:
            kinds: of tensors, whose files are compared; None: all of the checkpoint.

        Raises:
            WeightsError: a file is missing, damaged or cannot be read.
        """
        names = list(self.hashes) if kinds is None else [file_of(kind) for kind in kinds]
        for name in names:
            if name not in self.hashes:
                raise WeightsError(f"{self.folder} has no {name}")
        files = [self.folder / name for name in names]
        with ThreadPoolExecutor(max(1, len(files)), thread_name_prefix="hash") as pool:
            for file, found in zip(files, pool.map(_try_hash, files), strict=True):
                if isinstance(found, OSError):
                    reason = "is missing" if not file.exists() else f"cannot be read: {found}"
                    raise WeightsError(f"{file} {reason}")
                if found != self.hashes[file.name]:
                    raise WeightsError(f"{file} is damaged: its hash is not the manifest's")


class CheckpointStore:
    """Checkpoints under one folder."""

    def __init__(self, folder: Path, *, keep: int, unremoved: Unremoved = lambda _: None) -> None:
        """Open.

        Args:
            folder: of all checkpoints; made when the first one is written.
            keep: newest checkpoints that are kept, damaged ones not counted.
            unremoved: see `Unremoved`.
        """
        self.folder = folder
        self._keep = keep
        self._unremoved = unremoved
        self._whole: dict[PolicyVersion, _Stamp] = {}
        """Those whose bytes were seen to be whole, as they were then."""

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
            kinds: (kind, its tensors) one after another; one tensor is held in memory at a time.
            apart: how to do what needs no more tensors and may take long.

        Raises:
            WeightsError: there is one of this version; or it cannot be written, which leaves the others as they were.
        """
        final, temporary = self.folder / state.version, self.folder / f".{state.version}"
        if final.exists():
            raise WeightsError(f"{final} is there already and never rewritten")
        with self._told(final, temporary):
            make_folder(self.folder)
        with spared(self._unremoved):
            remove_leftovers(self.folder)
        with self._told(final, temporary):
            temporary.mkdir()
        for kind, tensors in kinds:
            self._write(final, temporary, kind, tensors)
        apart(partial(self._publish, state, temporary, final))
        return final

    def newest(
        self,
        passed_over: Callable[[WeightsError], None],
        *,
        kinds: Collection[str] | None = None,
    ) -> Checkpoint | None:
        """The newest checkpoint that is whole, or None. The writer may be at work: what it removes meanwhile is nothing to tell of.

        Args:
            passed_over: is told of each newer one that is not.
            kinds: see `Checkpoint.verify`.
        """
        tried: set[PolicyVersion] = set()
        # listed again each time, as newer ones may have taken the place of one that is gone
        while left := [version for version in self.versions() if version not in tried]:
            tried.add(left[-1])
            try:
                return self.at(left[-1], kinds=kinds)
            except WeightsError as error:
                if (self.folder / str(left[-1])).exists():
                    passed_over(error)
        return None

    def at(self, version: PolicyVersion, *, kinds: Collection[str] | None = None) -> Checkpoint:
        """The checkpoint of a version.

        Args:
            version: of the weights.
            kinds: see `Checkpoint.verify`.

        Raises:
            WeightsError: it is missing or damaged.
        """
        found = Checkpoint.read(self.folder / str(version))
        found.verify(kinds)
        return found

    def covered_step(self) -> int | None:
        """The policy step that all of the newest `keep` whole checkpoints have reached; None while there are fewer.

        Whatever becomes of any but the last of them, a run goes on from that step or a later one.
        """
        whole = (version for version in reversed(self.versions()) if self._is_whole(version))
        kept = list(islice(whole, self._keep))
        return min(version.step for version in kept) if len(kept) == self._keep else None

    def versions(self) -> list[PolicyVersion]:
        """Of all checkpoints, damaged ones too, oldest first."""
        return versions_in(self.folder) if self.folder.is_dir() else []

    def _write(
        self, final: Path, temporary: Path, kind: str, tensors: Iterable[NamedTensor]
    ) -> None:
        with self._told(final, temporary):
            writer = TensorFileWriter(temporary / file_of(kind))
        with writer:
            # what goes wrong while a tensor is gathered is not the disk's fault
            for tensor in tensors:
                with self._told(final, temporary):
                    chaos.point("learner.mid_checkpoint")
                    writer.add(tensor.name, tensor.info, [tensor.data])
            with self._told(final, temporary):
                writer.close()

    def _publish(self, state: TrainingState, temporary: Path, final: Path) -> None:
        with self._told(final, temporary):
            files = sorted(temporary.iterdir())
            with ThreadPoolExecutor(max(1, len(files)), thread_name_prefix="hash") as pool:
                hashes = dict(zip((f.name for f in files), pool.map(hash_file, files), strict=True))
            manifest: dict[str, Any] = {"state": asdict(state), "hashes": hashes}
            manifest["digest"] = _digest(manifest)
            (temporary / MANIFEST_FILE).write_text(json.dumps(manifest))
            publish_folder(temporary, final)
        # the checkpoint is safe: nothing from here on may fail the save
        with spared(self._unremoved):
            self._whole[state.policy_version] = _stamp(final)
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove what is older than the newest `keep` that are whole."""
        num_whole = 0
        for version in reversed(self.versions()):
            if num_whole >= self._keep:
                with spared(self._unremoved):
                    hidden = self.folder / f".old-{version}"
                    (self.folder / str(version)).rename(hidden)
                    self._whole.pop(version, None)
                    shutil.rmtree(hidden)
            elif self._is_whole(version):
                num_whole += 1

    def _is_whole(self, version: PolicyVersion) -> bool:
        """Whether a checkpoint is whole; read again only if something touched it since it was seen to be."""
        try:
            stamp = _stamp(self.folder / str(version))
            if self._whole.get(version) != stamp:
                self.at(version)
                self._whole[version] = stamp
        except (WeightsError, OSError):
            return False
        return True

    @contextlib.contextmanager
    def _told(self, final: Path, temporary: Path) -> Iterator[None]:
        """Have a checkpoint that cannot be written leave nothing of itself, and say what that means."""
        try:
            yield
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            before = self.versions()
            kept = f"{before[-1]} is the newest there is" if before else "there is none yet"
            raise WeightsError(
                f"checkpoint {final} cannot be written: {error.strerror or error}; nothing of it is left, {kept}; "
                "make room there (a checkpoint takes 12 bytes a parameter; checkpoint.keep says how many stay), "
                "then go on with the run"
            ) from error


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


def _try_hash(file: Path) -> str | OSError:
    try:
        return hash_file(file)
    except OSError as error:
        return error


def _digest(manifest: dict[str, Any]) -> str:
    """Of the rest of a manifest."""
    text = json.dumps(manifest, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_Stamp = tuple[tuple[str, int, int, int], ...]
"""Name, inode, size and time of change of every file of a checkpoint."""


def _stamp(folder: Path) -> _Stamp:
    files = sorted(folder.iterdir())
    stats = [(file.name, file.stat()) for file in files]
    return tuple((name, s.st_ino, s.st_size, s.st_ctime_ns) for name, s in stats)
