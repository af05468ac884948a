"""Who waits for a lease or a batch, and who holds which lease.

A request that is sent again while it waits, or after its lease went out, is still one request. When several peers
wait for a lease, the one that holds the fewest comes first, so that each actor gets work where prompts are few.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from treepo_async.wire.messages import Leased

Request = tuple[bytes, int]
"""A peer and the number of its request."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Somebody who asked for what is not there yet."""

    peer: bytes
    number: int
    """Of its request."""
    step: int | None
    """Of the batch it asked for; None for a lease."""
    deadline: float

    @property
    def request(self) -> Request:
        """By which it is known."""
        return self.peer, self.number


@dataclass
class Askers:
    """See the module."""

    waiting: dict[Request, Asker] = field(default_factory=dict)
    """In the order of asking."""
    granted: dict[Request, Leased] = field(default_factory=dict)
    """Leases that are out, by the request they answered."""

    def add(self, asker: Asker) -> None:
        """Let it wait, unless it does already: then its first deadline stands."""
        self.waiting.setdefault(asker.request, asker)

    def for_batches(self) -> list[Asker]:
        """Those who wait for a batch."""
        return [a for a in self.waiting.values() if a.step is not None]

    def for_leases(self) -> list[Asker]:
        """Those who wait for a lease."""
        return [a for a in self.waiting.values() if a.step is None]

    def count_granted(self) -> Counter[bytes]:
        """How many leases each peer holds."""
        return Counter(peer for peer, _ in self.granted)

    def refresh(self, is_leased: Callable[[str, int], bool]) -> None:
        """Forget leases that are not out any more, at their attempt."""
        self.granted = {
            request: lease
            for request, lease in self.granted.items()
            if is_leased(lease.lease_id, lease.attempt)
        }
