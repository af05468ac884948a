"""Prompts that ended without a tree, and why: a line each, in a file of its own beside the trees."""

import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from treepo_async.errors import DataError
from treepo_async.wire.whole_file import sync, whole_file

log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How a prompt ended that has no tree."""

    SKIPPED = "skipped"
    """The record cannot be used; it would end so again."""
    FAILED = "failed"
    """It could be used, and no attempt gave a tree."""


@dataclass(frozen=True, slots=True)
class Ending:
    """One of them."""

    prompt_id: str
    outcome: Outcome
    reason: str


class Endings:
    """All of them. A line that a kill left half written is forgotten: its prompt is tried again."""

    def __init__(self, file: Path, *, done: Collection[str], retry_failed: bool) -> None:
        """Read what is there, and remove what holds no more.

        Args:
            file: made at the first ending.
            done: prompts that have a tree.
            retry_failed: forget those that failed.
        """
        self.file = file
        self._is_synced = True
        found = _read(file)
        self.by_id = {
            ending.prompt_id: ending
            for ending in found
            if ending.prompt_id not in done
            and not (retry_failed and ending.outcome is Outcome.FAILED)
        }
        if len(self.by_id) < len(found) or (
            file.exists() and not file.read_bytes().endswith(b"\n")
        ):
            self._rewrite()

    def add(self, ending: Ending) -> None:
        """A prompt ended.

        Raises:
            DataError: it could not be written down.
        """
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(ending)) + "\n")
        except OSError as error:
            raise DataError(
                f"{self.file} cannot be written: {error.strerror}; make room and start again"
            ) from error
        self.by_id[ending.prompt_id] = ending
        self._is_synced = False

    def sync(self) -> None:
        """Return once all of them are on disk."""
        if not self._is_synced:
            # before, so that a line added meanwhile is synced the next time
            self._is_synced = True
            sync(self.file)
            sync(self.file.parent)

    def count(self, prompt_ids: Collection[str]) -> Counter[Outcome]:
        """How many of each kind, among these prompts."""
        return Counter(e.outcome for e in self.by_id.values() if e.prompt_id in prompt_ids)

    def _rewrite(self) -> None:
        if not self.by_id:
            self.file.unlink()
            return
        with whole_file(self.file) as file:
            for ending in self.by_id.values():
                file.write(json.dumps(asdict(ending)).encode() + b"\n")


def _read(file: Path) -> list[Ending]:
    endings = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            found = json.loads(line)
            ending = Ending(found["prompt_id"], Outcome(found["outcome"]), str(found["reason"]))
        except (ValueError, KeyError, TypeError):
            log.warning("%s: passed over the line %r", file, line[:80])
            continue
        endings.append(ending)
    return endings
