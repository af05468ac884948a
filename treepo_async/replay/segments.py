"""The files of the replay log, read: `<folder>/00000001.seg`, `00000002.seg`, ..., each a snapshot and what followed.

Reading changes nothing. What is no whole record is told as a damaged range that ends where the next whole header begins;
the last range of a file may also be the torn end of a write. `log` writes these files.
"""

import errno
import os
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

from treepo_async.errors import DataError
from treepo_async.replay.record import (
    HEADER_BYTES,
    MAGIC,
    Header,
    Kind,
    Place,
    header_of,
    parts_of,
)

SUFFIX = ".seg"
ALL = (Kind.TREE, Kind.NOTE, Kind.SNAPSHOT)
CHUNK_BYTES = 2**20
"""Read at once in the search for a header."""


class Scanned(NamedTuple):
    """A record that was found, or a range that holds none."""

    place: Place
    kind: Kind | None
    """None for a damaged range."""
    parts: list[bytes]
    """Empty where they were not asked for."""


def file_of(folder: Path, segment: int) -> Path:
    """The file of a segment."""
    return folder / f"{segment:08d}{SUFFIX}"


def segments_of(folder: Path) -> list[int]:
    """The segments that there are, in order."""
    return sorted(int(file.stem) for file in folder.glob(f"*{SUFFIX}") if file.stem.isdigit())


def scan(
    folder: Path,
    segment: int,
    start: int = 0,
    *,
    read: Container[Kind] = ALL,
) -> Iterator[Scanned]:
    """The records of a segment from an offset on.

    Args:
        folder: of the log.
        segment: which one.
        start: where a record begins.
        read: kinds whose parts are read and checked; the others are passed over.
    """
    with _File(folder, segment) as file:
        offset = start
        while offset < file.num_bytes:
            found = file.at(offset, read)
            yield found
            offset = found.place.end


def read_at(folder: Path, place: Place) -> list[bytes]:
    """The parts of the record at a place.

    Raises:
        DataError: it is not there, or damaged.
    """
    try:
        with _File(folder, place.segment) as file:
            found = file.at(place.offset, ALL)
    except FileNotFoundError as error:
        raise DataError(f"segment {place.segment} is not there") from error
    if found.kind is None or found.place != place:
        raise DataError(f"the record at {place} is damaged")
    return found.parts


def bytes_at(folder: Path, place: Place) -> bytes:
    """What lies at a place, as far as it can be read."""
    try:
        with _File(folder, place.segment) as file:
            return file.read(place.offset, place.length)
    except FileNotFoundError:
        return b""


class _File:
    """A segment that is open for reading."""

    def __init__(self, folder: Path, segment: int) -> None:
        self._segment = segment
        self._descriptor = os.open(file_of(folder, segment), os.O_RDONLY)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def at(self, offset: int, read: Container[Kind]) -> Scanned:
        """The record at an offset, or the damaged range that begins there."""
        header = header_of(self.read(offset, HEADER_BYTES), self._segment, offset)
        if header is None:
            return self._damaged(offset, self._next_header(offset + 1))
        if offset + header.length > self.num_bytes:
            return self._damaged(offset, self.num_bytes)
        place = Place(self._segment, offset, header.length)
        if header.kind not in read:
            return Scanned(place, header.kind, [])
        try:
            return Scanned(place, header.kind, self._parts(header, offset))
        except DataError:
            return Scanned(place, None, [])

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from an offset on, fewer at the end of the file or where the disk does not give them."""
        found = bytearray()
        while len(found) < length:
            try:
                more = os.pread(self._descriptor, length - len(found), offset + len(found))
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                break
            if not more:
                break
            found += more
        return bytes(found)

    def _parts(self, header: Header, offset: int) -> list[bytes]:
        return parts_of(header, self.read(offset + HEADER_BYTES, header.num_bytes))

    def _damaged(self, start: int, end: int) -> Scanned:
        return Scanned(Place(self._segment, start, end - start), None, [])

    def _next_header(self, offset: int) -> int:
        """Where the next whole header begins, or the file ends."""
        while offset < self.num_bytes:
            chunk = self.read(offset, CHUNK_BYTES + HEADER_BYTES)
            at = chunk.find(MAGIC)
            while at >= 0:
                if header_of(chunk[at : at + HEADER_BYTES], self._segment, offset + at):
                    return offset + at
                at = chunk.find(MAGIC, at + 1)
            offset += CHUNK_BYTES
        return self.num_bytes
