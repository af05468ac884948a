"""A file of lines that only grows, and is whole after any crash: what ends a prompt is one write.

A kill loses what was not written yet, a power cut at most the last second besides (`sync`). What either leaves half
written at the end is cut off when the file is opened again.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from treepo_async.errors import DataError, WireError
from treepo_async.wire.forms import LineKey, key_of
from treepo_async.wire.whole_file import sync

log = logging.getLogger(__name__)


class Journal:
    """The lines of one job."""

    def __init__(self, file: Path) -> None:
        """Open or create, and cut off what is not whole.

        Raises:
            DataError: a line before the end is damaged, or a prompt is there twice.
        """
        self._file = file
        self._fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        sync(file.parent)
        self._is_synced = True
        try:
            self.prompt_ids, self._size = _read(file)
        except DataError:
            os.close(self._fd)
            raise
        surplus = os.fstat(self._fd).st_size - self._size
        if surplus:
            log.warning("%s: cut off %d bytes of a tree that was not whole", file, surplus)
            os.ftruncate(self._fd, self._size)

    def append(self, prompt_id: str, lines: Sequence[bytes]) -> None:
        """Add the lines of a prompt.

        Raises:
            DataError: they could not be written; the file is as it was.
        """
        left = b"".join(line + b"\n" for line in lines)
        size = self._size + len(left)
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise DataError(
                f"{self._file} cannot be written: {error.strerror}; make room and start again"
            ) from error
        self._size, self._is_synced = size, False
        self.prompt_ids.add(prompt_id)

    def sync(self) -> None:
        """Return once all lines are on disk."""
        if not self._is_synced:
            # before, so that a line added meanwhile is synced the next time
            self._is_synced = True
            os.fsync(self._fd)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._fd)


def _read(file: Path) -> tuple[set[str], int]:
    """The prompts whose lines are whole, and where the last one of them ends."""
    prompt_ids: set[str] = set()
    offset = end = 0
    size = file.stat().st_size
    before: LineKey | None = None
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            offset += len(line)
            if not line.endswith(b"\n"):
                break
            try:
                key = key_of(line)
            except WireError as error:
                if offset == size:
                    break
                raise DataError(f"{file} line {number}: {error}; {_WAY_OUT}") from error
            if not _follows(key, before) or key.prompt_id in prompt_ids:
                raise DataError(
                    f"{file} line {number}: {key.prompt_id} is out of order; {_WAY_OUT}"
                )
            if key.is_last:
                prompt_ids.add(key.prompt_id)
                end = offset
            before = key
    return prompt_ids, end


_WAY_OUT = "the file was changed or damaged: repair it, name another out, or give overwrite=true"


def _follows(key: LineKey, before: LineKey | None) -> bool:
    """Whether a line may stand behind another."""
    if before is None or before.is_last:
        return key.leaf in (None, 0)
    return key.prompt_id == before.prompt_id and key.leaf == (before.leaf or 0) + 1
