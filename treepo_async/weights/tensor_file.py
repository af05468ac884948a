"""A safetensors file written tensor by tensor: no more than one block of one tensor need be in memory.

The header of a safetensors file comes first and names every tensor, but a writer that is given tensors one after another knows
them all only at the end. So room is left in front, and the header is padded with spaces to fill it, which the format allows.
Neighbours: `checkpoints` writes what the learner gathers, `export` what it reads from there; `store` has all tensors at hand and writes
several at a time, behind the `head_of` them; `manifest` reads headers.

Invariant: a file that was not closed has a header length of 0 and no header, and nobody takes it for a whole one.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from treepo_async.errors import WeightsError
from treepo_async.weights.manifest import TensorInfo

HEADER_ROOM = 512 * 2**10
"""Bytes left for the header where the tensors are not known beforehand; enough for about 4,000 of them."""
METADATA = {"format": "pt"}
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
LENGTH_BYTES = 8


class TensorFileWriter:
    """Writes one file; a context manager that closes it unless an error passes."""

    def __init__(self, file: Path, *, room: int = HEADER_ROOM) -> None:
        """Open.

        Args:
            file: new or to be overwritten.
            room: bytes for the header; `header_room` of the tensors, where they are known.
        """
        self._path, self._room = file, room
        self._entries: dict[str, dict[str, Any]] = {}
        self._end = 0
        self._file = file.open("wb")
        self._file.write(bytes(LENGTH_BYTES + room))

    def add(self, name: str, info: TensorInfo, blocks: Iterable[bytes | memoryview]) -> None:
        """Append a tensor.

        Args:
            name: of the tensor, not used before.
            info: what it looks like.
            blocks: its bytes, row-major, in as many parts as one likes.

        Raises:
            WeightsError: the name was used, or the bytes are not as many as `info` says.
        """
        if name in self._entries:
            raise WeightsError(f"{self._path}: tensor {name} is given twice")
        begin = self._end
        for block in blocks:
            self._file.write(block)
            self._end += len(block)
        if self._end - begin != num_bytes(info):
            raise WeightsError(
                f"{self._path}: tensor {name} has {self._end - begin} bytes, {info} has {num_bytes(info)}"
            )
        self._entries[name] = _entry(info, begin)

    def close(self) -> None:
        """Write the header; a second time does nothing.

        Raises:
            WeightsError: there are too many tensors for the room.
        """
        if self._file.closed:
            return
        header = _header(self._entries)
        if len(header) > self._room:
            raise WeightsError(
                f"{self._path}: the header of {len(self._entries)} tensors takes {len(header)} bytes, "
                f"there is room for {self._room}"
            )
        self._file.seek(0)
        self._file.write(self._room.to_bytes(LENGTH_BYTES, "little"))
        self._file.write(header.ljust(self._room))
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            # what is still buffered may not fit the disk either; the first error is the one to tell
            with contextlib.suppress(OSError):
                self._file.close()


def header_room(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of the header of these tensors, written in this order; a multiple of 8, so that data is aligned."""
    return -(-len(_header(_entries(tensors))) // 8) * 8


def head_of(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, list[int]]:
    """What comes before the data of these tensors, and where in the file each of them begins."""
    entries, room = _entries(tensors), header_room(tensors)
    head = room.to_bytes(LENGTH_BYTES, "little") + _header(entries).ljust(room)
    return head, [len(head) + entry["data_offsets"][0] for entry in entries.values()]


def num_bytes(info: TensorInfo) -> int:
    """Of a tensor."""
    count = 1
    for size in info.shape:
        count *= size
    return count * ITEM_BYTES[info.dtype]


def _entries(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    entries, end = {}, 0
    for name, info in tensors.items():
        entries[name] = _entry(info, end)
        end += num_bytes(info)
    return entries


def _entry(info: TensorInfo, begin: int) -> dict[str, Any]:
    offsets = [begin, begin + num_bytes(info)]
    return {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}


def _header(entries: Mapping[str, dict[str, Any]]) -> bytes:
    return json.dumps({"__metadata__": METADATA, **entries}, separators=(",", ":")).encode()
