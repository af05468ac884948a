"""Trees of a file by number: read as they are asked for, in any order, for training without actors.

The file is one that the stand-alone actor wrote, as lines or as a table. It may not change while it is read.
"""

from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from treepo_async.errors import ConfigError, DataError, WireError
from treepo_async.types import Tree
from treepo_async.wire.forms import key_of
from treepo_async.wire.tables import TableReader
from treepo_async.wire.tree_line import decode_line, decode_row


class _Entries(Protocol):
    """A file's entries by number."""

    def __len__(self) -> int: ...

    def tree(self, index: int, vocab_size: int | None) -> Tree:
        """The tree of an entry; raises WireError."""


class TreeFile:
    """The trees of a file."""

    def __init__(self, path: Path, *, vocab_size: int | None = None) -> None:
        """Find where its trees lie.

        Args:
            path: `.jsonl` or `.parquet`.
            vocab_size: of the model that will be trained; other token ids are refused.

        Raises:
            ConfigError: the file does not exist or has a form that is not read.
            DataError: it has no tree.
        """
        readers: dict[str, Callable[[Path], _Entries]] = {".jsonl": _Lines, ".parquet": _Rows}
        if path.suffix not in readers:
            raise ConfigError(f"{path} must be a .jsonl or .parquet file of trees")
        if not path.is_file():
            raise ConfigError(f"{path} does not exist; check the path")
        self.path = path
        self._vocab_size = vocab_size
        self._entries = readers[path.suffix](path)
        if len(self) == 0:
            raise DataError(f"{path} has no tree")

    def __len__(self) -> int:
        return len(self._entries)

    def tree(self, index: int) -> Tree:
        """The tree at `index`, from 0.

        Raises:
            DataError: it is damaged, or its token ids are outside the vocabulary.
        """
        try:
            return self._entries.tree(index, self._vocab_size)
        except WireError as error:
            raise DataError(f"{self.path} entry {index + 1}: {error}") from error


class _Lines:
    """Where each line begins; empty lines are none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._offsets = array("q")
        offset = 0
        for line in self._file:
            if line.strip():
                self._offsets.append(offset)
            offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def tree(self, index: int, vocab_size: int | None) -> Tree:
        self._file.seek(self._offsets[index])
        line = self._file.readline()
        try:
            return decode_line(line, vocab_size=vocab_size)
        except WireError as error:
            if _is_trajectory(line):
                raise WireError(
                    "holds a trajectory, not a tree; generate it with out_form=trees"
                ) from error
            raise


class _Rows:
    """The rows of a table."""

    def __init__(self, path: Path) -> None:
        self._reader = TableReader(path)

    def __len__(self) -> int:
        return len(self._reader)

    def tree(self, index: int, vocab_size: int | None) -> Tree:
        row = self._reader.row(index)
        if "leaf" in row:
            raise WireError("holds a trajectory, not a tree; generate it with out_form=trees")
        return decode_row(row, vocab_size=vocab_size)


def _is_trajectory(line: bytes) -> bool:
    try:
        return key_of(line).leaf is not None
    except WireError:
        return False
