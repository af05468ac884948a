"""One record of the replay log: a header, the lengths of its parts, the parts.

    magic | kind | number of parts | bytes after the header | their digest | digest of the header | lengths | part | ...

Digests are 64-bit xxh3. That of the header is seeded with the record's place, so a copy of a record elsewhere, as in the
bytes of a tree, is none. `notes` says what the parts hold, `segments` reads records from files, `log` writes them.
"""

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import xxhash

from treepo_async.errors import DataError

MAGIC = b"\x89TPOLOG\n"
_FIELDS = struct.Struct("<8sIIQQ")
_DIGEST = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _DIGEST.size
_OFFSET_BITS = 40
_MASK = 2**64 - 1


class Kind(IntEnum):
    """What a record is."""

    TREE = 1
    NOTE = 2
    SNAPSHOT = 3


class Place(NamedTuple):
    """Where a record lies."""

    segment: int
    offset: int
    length: int
    """Bytes of the whole record."""

    @property
    def end(self) -> int:
        """Offset behind it."""
        return self.offset + self.length


class Header(NamedTuple):
    """A header that is whole."""

    kind: Kind
    num_parts: int
    num_bytes: int
    """After the header."""
    digest: int

    @property
    def length(self) -> int:
        """Bytes of the whole record."""
        return HEADER_BYTES + self.num_bytes


def length_of(parts: Sequence[bytes]) -> int:
    """Bytes of a record with these parts."""
    return HEADER_BYTES + 8 * len(parts) + sum(memoryview(part).nbytes for part in parts)


def encode(kind: Kind, parts: Sequence[bytes], segment: int, offset: int) -> list[bytes]:
    """A record for one place, as buffers to be written one after the other; the parts are not copied."""
    lengths = struct.pack(f"<{len(parts)}Q", *(memoryview(part).nbytes for part in parts))
    digest = xxhash.xxh3_64(lengths)
    for part in parts:
        digest.update(part)
    num_bytes = length_of(parts) - HEADER_BYTES
    fields = _FIELDS.pack(MAGIC, kind, len(parts), num_bytes, digest.intdigest())
    return [fields + _DIGEST.pack(_seal(fields, segment, offset)) + lengths, *parts]


def header_of(data: bytes, segment: int, offset: int) -> Header | None:
    """The header at a place; None where there is no whole one.

    Args:
        data: at least `HEADER_BYTES` bytes from that place on; fewer hold none.
        segment: of the place.
        offset: of the place.
    """
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        return None
    fields = data[: _FIELDS.size]
    if _DIGEST.unpack_from(data, _FIELDS.size)[0] != _seal(fields, segment, offset):
        return None
    _, kind, num_parts, num_bytes, digest = _FIELDS.unpack(fields)
    if kind not in Kind.__members__.values() or 8 * num_parts > num_bytes:
        return None
    return Header(Kind(kind), num_parts, num_bytes, digest)


def parts_of(header: Header, payload: bytes) -> list[bytes]:
    """The parts of a record.

    Args:
        header: of the record.
        payload: what follows it.

    Raises:
        DataError: they are not what was written.
    """
    if len(payload) != header.num_bytes or xxhash.xxh3_64_intdigest(payload) != header.digest:
        raise DataError(f"a {header.kind.name.lower()} record is damaged")
    lengths = struct.unpack_from(f"<{header.num_parts}Q", payload)
    if 8 * header.num_parts + sum(lengths) != header.num_bytes:
        raise DataError(f"a {header.kind.name.lower()} record has parts of {sum(lengths)} bytes")
    parts, start = [], 8 * header.num_parts
    for length in lengths:
        parts.append(payload[start : start + length])
        start += length
    return parts


def _seal(fields: bytes, segment: int, offset: int) -> int:
    place = (segment << _OFFSET_BITS | offset) & _MASK
    return xxhash.xxh3_64_intdigest(fields, seed=place)
