"""The end of the replay log, where records are appended.

Invariant: `append` and `begin` write all they were given, or raise OSError and leave the log as it was. Nothing written is
on disk for certain before `sync` returns. Where bytes of a failed write cannot be taken back at once, nothing further is
appended before they are.
"""

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from treepo_async import chaos
from treepo_async.replay.record import Kind, Place, encode, length_of
from treepo_async.replay.segments import file_of
from treepo_async.wire.whole_file import sync as sync_folder

MAX_BUFFERS = 512
"""Of one system call."""


class Log:
    """The newest segment, once there is one of this process.

    Args:
        folder: of the segments.
        segment_bytes: size at which a segment is full.
    """

    def __init__(self, folder: Path, segment_bytes: int) -> None:
        self.folder = folder
        self.segment = 0
        self.end = 0
        """Offset at which the next record begins."""
        self._segment_bytes = segment_bytes
        self._descriptor: int | None = None
        self._snapshot_bytes = 0
        self._is_torn = False

    @property
    def is_full(self) -> bool:
        """Whether a segment must begin before the next record; it holds a multiple of its snapshot at least."""
        least = max(self._segment_bytes, self._snapshot_bytes)
        return self._descriptor is None or self.end - self._snapshot_bytes >= least

    def begin(self, segment: int, snapshot: Sequence[bytes]) -> None:
        """Begin a segment with a snapshot, and return once both are on disk."""
        file = file_of(self.folder, segment)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write(descriptor, encode(Kind.SNAPSHOT, snapshot, segment, 0), 0)
            os.fdatasync(descriptor)
            sync_folder(self.folder)
        except OSError:
            os.close(descriptor)
            file.unlink()
            raise
        self.close()
        self._descriptor, self.segment, self._is_torn = descriptor, segment, False
        self.end = self._snapshot_bytes = length_of(snapshot)

    def append(self, records: Iterable[tuple[Kind, Sequence[bytes]]]) -> list[Place]:
        """Append records, each a kind with its parts. Gives their places."""
        start = self.end
        self._mend()
        places: list[Place] = []
        buffers: list[bytes] = []
        for kind, parts in records:
            buffers += encode(kind, parts, self.segment, self.end)
            places.append(Place(self.segment, self.end, length_of(parts)))
            self.end = places[-1].end
        try:
            _write(self._open(), buffers, start)
        except OSError:
            self.cut(start)
            raise
        return places

    def sync(self) -> None:
        """Return once all that was appended is on disk."""
        chaos.point("replay.before_sync")
        os.fdatasync(self._open())

    def cut(self, end: int) -> None:
        """Take back what was appended behind an offset; where that fails, before the next record is appended."""
        self.end, self._is_torn = end, True
        with contextlib.suppress(OSError):
            self._mend()

    def close(self) -> None:
        """Append nothing more to this segment."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _mend(self) -> None:
        if self._is_torn:
            os.ftruncate(self._open(), self.end)
            self._is_torn = False

    def _open(self) -> int:
        assert self._descriptor is not None, "a segment has begun"
        return self._descriptor


def _write(descriptor: int, buffers: Iterable[bytes], offset: int) -> None:
    """Write all of it, however little of it the system takes at once."""
    left = [view for buffer in buffers if (view := memoryview(buffer).cast("B")).nbytes]
    while left:
        some = left[:MAX_BUFFERS]
        if chaos.point("replay.write") == "short":
            some = [some[0][: (len(some[0]) + 1) // 2]]
        written = os.pwritev(descriptor, some, offset)
        offset += written
        while written:
            first = left.pop(0)
            if written < first.nbytes:
                left.insert(0, first[written:])
            written -= min(written, first.nbytes)
