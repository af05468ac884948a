"""How many bytes of trees may lie on disk: no prompt is leased whose tree might not fit beside those that are there.

A tree counts as large as the largest so far. A prompt that was leased once keeps its place until its tree is in: what
the learner waits for next is never without room because of what comes after it. So the bound may be passed by what
trees grow larger than those before them, and the very first ones go out on trust.
"""

from dataclasses import dataclass
from typing import Protocol

from treepo_async.errors import TreepoError
from treepo_async.replay.entry import State
from treepo_async.replay.queue import Queue

MANY = 2**31
"""Leases: no run has as many out."""


class Stored(Protocol):
    """What is there; see `replay.group.Group`."""

    @property
    def num_bytes(self) -> int:
        """Of all trees."""

    @property
    def largest(self) -> int:
        """Bytes of the largest tree so far; 0 before the first."""


@dataclass
class Budget:
    """See the module."""

    queue: Queue
    stored: Stored
    max_bytes: int

    def has_room(self) -> bool:
        """Whether the tree of another lease would fit."""
        return self.num_fitting() > 0

    def num_fitting(self) -> int:
        """How many more leases may go out, so that the trees of all would fit."""
        free = self.max_bytes - self.stored.num_bytes
        if self.stored.largest == 0:
            return MANY if free >= 0 else 0
        num_waiting = self._count(State.WAITING)
        num_new = free // self.stored.largest - self._count(State.LEASED) - num_waiting
        return num_waiting + max(0, num_new)

    def check(self) -> None:
        """Raise TreepoError where the learner waits for trees that will never fit: no checkpoint will come and make room."""
        if not self.has_room() and self._count(State.LEASED) == 0 and self.queue.may_lease():
            raise TreepoError(
                f"{self.stored.num_bytes} bytes of trees wait for a checkpoint, and no further tree fits into "
                f"replay.max_disk_bytes={self.max_bytes}; raise it, or lower checkpoint.every or checkpoint.keep"
            )

    def _count(self, state: State) -> int:
        return sum(entry.state is state for entry in self.queue.order.live.values())
