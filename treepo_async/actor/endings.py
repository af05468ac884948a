"""Prompts that ended without a tree, and why: a line each, in a file of its own beside the trees."""

import json
import logging
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

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
        """A prompt ended."""
        self.by_id[ending.prompt_id] = ending
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(ending)) + "\n")

    def count(self) -> Counter[Outcome]:
        """How many of each kind."""
        return Counter(ending.outcome for ending in self.by_id.values())

    def _rewrite(self) -> None:
        if not self.by_id:
            self.file.unlink()
            return
        temporary = self.file.with_name(f".{self.file.name}")
        lines = [json.dumps(asdict(ending)) + "\n" for ending in self.by_id.values()]
        temporary.write_text("".join(lines), encoding="utf-8")
        temporary.replace(self.file)


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
