"""One prompt on its way through the queue. Its lease id is its prompt index in fixed width, so each gives the other."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

MAX_DIGITS = 18
"""Of a prompt index: longer lease ids were never given."""


class State(StrEnum):
    """Where an entry stands."""

    WAITING = "waiting"
    LEASED = "leased"
    ACCEPTED = "accepted"
    CONSUMED = "consumed"
    TRAINED = "trained"
    DROPPED = "dropped"
    QUARANTINED = "quarantined"


LIVE = (State.WAITING, State.LEASED, State.ACCEPTED)
FINAL = (State.TRAINED, State.DROPPED, State.QUARANTINED)


class Row(NamedTuple):
    """What of an entry survives the process."""

    prompt_index: int
    state: str
    attempt: int
    owner: str
    failed: tuple[str, ...]
    step: int | None
    oldest_step: int | None
    reason: str
    uncounted: int = 0


@dataclass(slots=True)
class Entry:
    """One prompt on its way."""

    prompt_index: int
    state: State = State.WAITING
    attempt: int = 0
    """Leases so far: no two of them have the same number."""
    owner: str = ""
    """Actor that holds the lease."""
    failed: tuple[str, ...] = ()
    """Actors that failed on it."""
    step: int | None = None
    """Whose batch it is in."""
    oldest_step: int | None = None
    """Lowest policy step among the segments of its tree."""
    reason: str = ""
    """Why it ended, where it was not trained."""
    uncounted: int = 0
    """Leases that count as no attempt: handed back, or of a tree that was lost later."""
    granted: float = 0.0
    """When its actor got the lease."""
    deadline: float = 0.0
    """Until when its actor must be heard of."""
    limit: float = 0.0
    """Until when its tree must be in, whatever is heard."""

    @property
    def lease_id(self) -> str:
        """Name of all its leases."""
        return f"{self.prompt_index:09d}"

    @property
    def tries(self) -> int:
        """Leases so far that count as attempts."""
        return self.attempt - self.uncounted

    def row(self) -> Row:
        """What is kept of it."""
        return Row(
            self.prompt_index,
            str(self.state),
            self.attempt,
            self.owner,
            self.failed,
            self.step,
            self.oldest_step,
            self.reason,
            self.uncounted,
        )

    @classmethod
    def of(cls, row: Row) -> Self:
        """The entry of a row; its deadlines are the queue's business."""
        return cls(row.prompt_index, State(row.state), *row[2:])


def prompt_index_of(lease_id: str) -> int | None:
    """The prompt that a lease id names; None for what is no lease id."""
    if not (lease_id.isascii() and lease_id.isdigit() and len(lease_id) <= MAX_DIGITS):
        return None
    entry = Entry(int(lease_id))
    return entry.prompt_index if entry.lease_id == lease_id else None
