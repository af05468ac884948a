"""What the records of the replay log hold.

    TREE        prompt index, attempt and digest, then the frames of the tree
    NOTE        what one commit changed, and where its trees lie: the records of its trees count only with it
    SNAPSHOT    the same for the whole queue; the first record of each file

Notes are numbered without a gap, and a snapshot has the number of the note before it, so a missing one is noticed.
"""

import json
import struct
from collections.abc import Sequence
from typing import NamedTuple, Self

from treepo_async.errors import DataError
from treepo_async.replay.record import Place
from treepo_async.replay.state import Changes

_TREE = struct.Struct("<QQQ")


class TreeRow(NamedTuple):
    """A stored tree."""

    prompt_index: int
    attempt: int
    digest: int
    """Of its frames, as its actor gave it; unsigned, 64 bits."""
    num_bytes: int
    """Of its frames."""
    segment: int
    offset: int
    length: int
    """Bytes of its record."""

    @property
    def place(self) -> Place:
        """Of its record."""
        return Place(self.segment, self.offset, self.length)


class Note(NamedTuple):
    """What a note or a snapshot holds."""

    sequence: int
    run_id: str
    """Of the run that wrote it."""
    trees: tuple[TreeRow, ...]
    """A note: those of the commit. A snapshot: all."""
    changes: Changes | None
    """A snapshot: the whole state."""

    def to_parts(self) -> list[bytes]:
        """As parts of a record."""
        head = json.dumps([self.sequence, self.run_id]).encode()
        trees = json.dumps([*map(list, self.trees)]).encode()
        changes = [] if self.changes is None else [self.changes.to_json().encode()]
        return [head, trees, *changes]

    @classmethod
    def parse(cls, parts: Sequence[bytes]) -> Self:
        """Read what `to_parts` wrote.

        Raises:
            DataError: the parts are something else.
        """
        try:
            sequence, run_id = json.loads(parts[0])
            rows = tuple(TreeRow(*row) for row in json.loads(parts[1]))
            changes = Changes.parse(parts[2].decode()) if len(parts) > 2 else None
            return cls(sequence, run_id, rows, changes)
        except (ValueError, TypeError, IndexError, RecursionError) as error:
            raise DataError(f"a note cannot be read: {error}") from error


def sequence_of(parts: Sequence[bytes]) -> int:
    """The number of a note or a snapshot, without reading the rest of it.

    Raises:
        DataError: the parts are something else.
    """
    try:
        sequence, _ = json.loads(parts[0])
        return int(sequence)
    except (ValueError, TypeError, IndexError, RecursionError) as error:
        raise DataError(f"a note cannot be read: {error}") from error


def tree_parts(
    prompt_index: int, attempt: int, digest: int, frames: Sequence[bytes]
) -> list[bytes]:
    """A tree as parts of a record."""
    return [_TREE.pack(prompt_index, attempt, digest), *frames]


def frames_of(row: TreeRow, parts: Sequence[bytes]) -> list[bytes]:
    """The frames in the record of a tree.

    Raises:
        DataError: the record is of another tree.
    """
    if not parts or parts[0] != _TREE.pack(row.prompt_index, row.attempt, row.digest):
        raise DataError(f"the record at {row.place} is not that of prompt {row.prompt_index}")
    return list(parts[1:])
