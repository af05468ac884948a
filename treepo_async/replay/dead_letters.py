"""Prompts that were given up: one JSON line each in `<run>/replay/dead_letters.jsonl`, for a person to look at."""

import json
import os
import time
from pathlib import Path
from typing import BinaryIO, NamedTuple

from treepo_async.replay.entry import Row

FILE = "dead_letters.jsonl"


class Letter(NamedTuple):
    """What is written of one prompt."""

    row: Row
    """Of its entry."""
    reason: str
    """Why its last attempt failed."""
    prompt_id: str
    """In its data."""
    text: str
    """Of the prompt."""


class DeadLetters:
    """Appends to the file."""

    def __init__(self, folder: Path) -> None:
        """Name the folder, which is there."""
        self._file = folder / FILE

    def add(self, letter: Letter) -> None:
        """Write a prompt down; returns once it is on disk.

        Raises:
            OSError: it is not; what there may be of its line is no part of the next one.
        """
        row = letter.row
        line = {
            "prompt_index": row.prompt_index,
            "prompt_id": letter.prompt_id,
            "attempts": row.attempt - row.uncounted,
            "actors": list(row.failed),
            "reason": letter.reason,
            "time": time.time(),
            "text": letter.text,
        }
        with self._file.open("ab+") as file:
            if file.tell() and not _ends_line(file):
                file.write(b"\n")
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def indexes(self) -> set[int]:
        """Prompts that are written down."""
        try:
            lines = self._file.read_bytes().splitlines()
        except FileNotFoundError:
            return set()
        return {index for line in lines if (index := _index_in(line)) is not None}


def _ends_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _index_in(line: bytes) -> int | None:
    """None for what is left of a line."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    index = found.get("prompt_index") if isinstance(found, dict) else None
    return index if isinstance(index, int) else None
