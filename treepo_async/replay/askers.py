"""Who waits for a lease or a batch, and who holds which lease.

A request that is sent again while it waits, or after its lease went out, is still one request. When several peers
wait for a lease, the one that holds the fewest comes first, so that each actor gets work where prompts are few.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from treepo_async.wire.messages import AskBatch, AskLease, Leased

MAX_ANSWERED = 4096
"""Requests whose answers are remembered: more than come between a request and the last time it is sent again."""

MAX_WAITING = 256
"""Requests of one peer that wait: more than it has under way."""

Request = tuple[bytes, int]
"""A peer and the number of its request."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Somebody who asked for what is not there yet."""

    peer: bytes
    number: int
    """Of its request."""
    message: AskLease | AskBatch
    """What it asked for."""
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
    _num_waiting: Counter[bytes] = field(default_factory=Counter)
    """By peer."""
    _answered: dict[Request, None] = field(default_factory=dict)
    """Requests for leases, in the order of their answers."""

    def add(self, asker: Asker) -> Asker | None:
        """Let it wait, unless it does already: then its first deadline stands.

        Returns:
            The longest waiting of the peer where there are too many: it is to be sent away.
        """
        if asker.request in self.waiting:
            return None
        self.waiting[asker.request] = asker
        self._num_waiting[asker.peer] += 1
        if self._num_waiting[asker.peer] <= MAX_WAITING:
            return None
        return next(other for other in self.waiting.values() if other.peer == asker.peer)

    def done(self, asker: Asker) -> None:
        """It has its answer."""
        if self.waiting.pop(asker.request, None) is not None:
            self._num_waiting[asker.peer] -= 1
            if self._num_waiting[asker.peer] == 0:
                del self._num_waiting[asker.peer]
        if isinstance(asker.message, AskLease):
            self._answered[asker.request] = None
            while len(self._answered) > MAX_ANSWERED:
                del self._answered[next(iter(self._answered))]

    def was_answered(self, peer: bytes, number: int) -> bool:
        """Whether a request for a lease had an answer already.

        Its peer may have gone on since: a lease that answered it once more would wait for nobody.
        """
        return (peer, number) in self._answered

    def forget(self, peer: bytes) -> None:
        """A peer waits for nothing any more."""
        self.waiting = {key: asker for key, asker in self.waiting.items() if asker.peer != peer}
        self._num_waiting.pop(peer, None)

    def for_batches(self) -> list[Asker]:
        """Those who wait for a batch."""
        return [a for a in self.waiting.values() if isinstance(a.message, AskBatch)]

    def for_leases(self) -> list[Asker]:
        """Those who wait for a lease."""
        return [a for a in self.waiting.values() if isinstance(a.message, AskLease)]

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
