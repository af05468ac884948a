"""How the index is brought up to the log when replay starts: the notes behind its position are applied, in their order.

index behind the log        its position is where reading starts: at most one commit, unless the file is an old copy
index missing or damaged    reading starts at the oldest segment; notes and snapshots are read, trees passed over
a gap in the notes          the next snapshot closes it; where none follows, the state is not known: DataError
bytes that are no record    copied to quarantine; behind the last note, cut off: no peer was answered for them
"""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from treepo_async.errors import DataError
from treepo_async.metrics.events import emit
from treepo_async.replay.index import Index, Position
from treepo_async.replay.notes import Note, TreeRow, frames_of, sequence_of
from treepo_async.replay.record import Kind, Place
from treepo_async.replay.segments import bytes_at, file_of, read_at, scan, segments_of

FIRST_BYTES = 4096
"""More than the first snapshot of a run."""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a store keeps what."""

    folder: Path

    @property
    def log(self) -> Path:
        """Folder of the segments."""
        return self.folder / "log"

    @property
    def index(self) -> Path:
        """The SQLite file."""
        return self.folder / "index.sqlite"

    @property
    def quarantine(self) -> Path:
        """Folder of what was damaged."""
        return self.folder / "quarantine"


@dataclass
class _Fold:
    """What the notes have come to."""

    index: Index
    position: Position | None
    gap: int | None = None
    """Number of a note that is missing, until a snapshot makes up for it."""
    damaged: list[Place] = field(default_factory=list)
    newest: Note | None = None
    ends: dict[int, int] = field(default_factory=dict)
    """By segment: where its last note or snapshot ends."""

    def take(self, kind: Kind, parts: list[bytes], place: Place) -> None:
        """The next note or snapshot of the log."""
        self.ends[place.segment] = place.end
        sequence = self.position.sequence if self.position else -1
        if sequence_of(parts) <= sequence:
            return
        note = Note.parse(parts)
        if kind is Kind.SNAPSHOT:
            self.index.restore(note, place.segment, place.end)
            if note.changes is not None and note.changes.counts.next_index:
                self.index.begin_account(note.changes.counts)
            self.gap = None
        elif self.position and note.sequence == sequence + 1:
            self.index.apply(note, place.segment, place.end)
        else:
            self.gap = sequence + 1
            return
        self.newest = note
        self.position = Position(place.segment, place.end, note.sequence)


def open_index(paths: Paths) -> Index:
    """The index of a log, made anew where it is damaged."""
    try:
        index = Index.open(paths.index)
    except DataError as error:
        return _replaced(paths, error)
    try:
        index.position()
        index.trees()
        index.state()
    except DataError as error:
        index.close()
        return _replaced(paths, error)
    return index


def catch_up(index: Index, paths: Paths) -> list[TreeRow]:
    """Apply what the log has behind the index's position, and cut its torn end.

    Returns:
        The trees of the last note that was applied: a power cut may have left it on disk without them.

    Raises:
        DataError: the log cannot tell where the queue stands.
    """
    segments = segments_of(paths.log)
    fold = _Fold(index, index.position())
    is_new = fold.position is None
    with index.transaction():
        _read(fold, paths, segments)
        _check(fold, paths, segments)
    quarantine(paths, fold.damaged, "the log of replay is damaged")
    if segments:
        _cut(fold, paths, segments[-1], keep=is_new)
    if is_new and fold.newest:
        emit("alarm", alarm="the index of replay was made anew", sequence=fold.newest.sequence)
    return list(fold.newest.trees) if fold.newest else []


def tree_at(paths: Paths, row: TreeRow) -> list[bytes]:
    """The frames of a tree.

    Raises:
        DataError: its record is not there, damaged, or of another tree.
    """
    return frames_of(row, read_at(paths.log, row.place))


def whole_trees(paths: Paths, trees: Iterable[TreeRow]) -> list[TreeRow]:
    """Those whose files are long enough to hold them."""
    sizes = {
        segment: file_of(paths.log, segment).stat().st_size for segment in segments_of(paths.log)
    }
    return [tree for tree in trees if tree.place.end <= sizes.get(tree.segment, 0)]


def quarantine(paths: Paths, places: Iterable[Place], alarm: str) -> None:
    """Keep the bytes of damaged records for whoever looks into it, as far as there is room."""
    for place in places:
        name = paths.quarantine / f"{place.segment:08d}-{place.offset}.bin"
        with contextlib.suppress(OSError):
            paths.quarantine.mkdir(exist_ok=True)
            name.write_bytes(bytes_at(paths.log, place))
        emit("alarm", alarm=alarm, bytes=place.length, kept=str(name))


def _read(fold: _Fold, paths: Paths, segments: list[int]) -> None:
    start = fold.position or Position(0, 0, -1)
    for segment in segments:
        if segment < start.segment:
            continue
        offset = start.offset if segment == start.segment else 0
        fold.ends[segment] = offset
        ranges: list[Place] = []
        for found in scan(paths.log, segment, offset, read=(Kind.NOTE, Kind.SNAPSHOT)):
            if found.kind is None:
                ranges.append(found.place)
            elif found.parts:
                fold.damaged += ranges
                ranges = []
                fold.take(found.kind, found.parts, found.place)
        if segment != segments[-1]:
            fold.damaged += ranges


def _check(fold: _Fold, paths: Paths, segments: list[int]) -> None:
    if fold.gap is None and fold.position is None:
        # a process that died at its very first write leaves a part of an empty snapshot
        num_bytes = sum(file_of(paths.log, segment).stat().st_size for segment in segments)
        fold.gap = 0 if num_bytes > FIRST_BYTES else None
    if fold.gap is not None:
        raise DataError(
            f"{paths.log}: note {fold.gap} is damaged and so is the index, so it is not known where the queue stands; "
            f"bring {paths.index.name} or the log back from a copy, or move {paths.folder} away and begin anew"
        )


def _cut(fold: _Fold, paths: Paths, segment: int, *, keep: bool) -> None:
    """Cut the newest segment behind its last note; one without a snapshot goes.

    Args:
        fold: of the whole log.
        paths: of the store.
        segment: the newest one.
        keep: copy what is cut to quarantine: without an index it may have been answered for.
    """
    file = file_of(paths.log, segment)
    num_bytes = file.stat().st_size
    end = fold.ends.get(segment, num_bytes)
    if num_bytes > end:
        emit("alarm", alarm="the log of replay had a torn end", bytes=num_bytes - end)
        if keep:
            quarantine(paths, [Place(segment, end, num_bytes - end)], "a torn end is kept")
        os.truncate(file, end)
    if end == 0:
        file.unlink()


def _replaced(paths: Paths, error: DataError) -> Index:
    emit("alarm", alarm="the index of replay is damaged", detail=str(error))
    paths.quarantine.mkdir(exist_ok=True)
    for suffix in ("", "-wal", "-shm"):
        file = paths.index.with_name(paths.index.name + suffix)
        if file.exists():
            file.replace(paths.quarantine / file.name)
    return Index.open(paths.index)
