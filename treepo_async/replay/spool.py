"""Where accepted trees lie until a checkpoint covers them.

`MemorySpool` keeps them in memory: they die with the process, and replay then hands their prompts out again. Which
trees a step consumed, in order, is part of the queue's position, which is on disk.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol


class Spool(Protocol):
    """Trees by lease id. `append` returns once the tree is stored."""

    def append(self, lease_id: str, frames: Sequence[bytes]) -> None:
        """Store a tree; the same lease id again stores nothing."""

    def holds(self, lease_id: str) -> bool:
        """Whether the tree is stored."""

    def read(self, lease_id: str) -> list[bytes]:
        """The frames of a stored tree."""

    def forget(self, lease_ids: Iterable[str]) -> None:
        """Remove trees; those that are not stored are no error."""


class MemorySpool:
    """A spool that is lost with its process."""

    def __init__(self) -> None:
        self._frames: dict[str, list[bytes]] = {}

    def append(self, lease_id: str, frames: Sequence[bytes]) -> None:
        """See `Spool`."""
        self._frames.setdefault(lease_id, [bytes(frame) for frame in frames])

    def holds(self, lease_id: str) -> bool:
        """See `Spool`."""
        return lease_id in self._frames

    def read(self, lease_id: str) -> list[bytes]:
        """See `Spool`."""
        return self._frames[lease_id]

    def forget(self, lease_ids: Iterable[str]) -> None:
        """See `Spool`."""
        for lease_id in lease_ids:
            self._frames.pop(lease_id, None)
