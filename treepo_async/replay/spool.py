"""Where accepted trees and the journal of batches lie until a checkpoint covers them.

`MemorySpool` keeps both in memory: they die with the process, and replay then hands the prompts out again.
"""

from collections.abc import Sequence
from typing import Protocol


class Spool(Protocol):
    """Trees by lease id, and which of them each step consumed. `append` and `journal` return once stored."""

    def append(self, lease_id: str, frames: Sequence[bytes]) -> None:
        """Store a tree; the same lease id again stores nothing."""

    def read(self, lease_id: str) -> list[bytes]:
        """The frames of a stored tree."""

    def journal(self, step: int, lease_ids: Sequence[str]) -> None:
        """Record, before anything is computed, which trees a step consumes, in order."""

    def retire(self, step: int) -> None:
        """Forget the trees of all steps up to and including `step`."""


class MemorySpool:
    """A spool that is lost with its process."""

    def __init__(self) -> None:
        self._frames: dict[str, list[bytes]] = {}
        self._journal: dict[int, list[str]] = {}

    def append(self, lease_id: str, frames: Sequence[bytes]) -> None:
        """See `Spool`."""
        self._frames.setdefault(lease_id, [bytes(frame) for frame in frames])

    def read(self, lease_id: str) -> list[bytes]:
        """See `Spool`."""
        return self._frames[lease_id]

    def journal(self, step: int, lease_ids: Sequence[str]) -> None:
        """See `Spool`."""
        self._journal[step] = list(lease_ids)

    def retire(self, step: int) -> None:
        """See `Spool`."""
        for old in [s for s in self._journal if s <= step]:
            for lease_id in self._journal.pop(old):
                del self._frames[lease_id]
