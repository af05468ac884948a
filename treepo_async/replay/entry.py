"""One prompt on its way through the queue. Its lease id is its prompt index in fixed width, so each gives the other."""

from dataclasses import dataclass
from enum import StrEnum

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


@dataclass(slots=True)
class Entry:
    """One prompt on its way."""

    prompt_index: int
    state: State = State.WAITING
    attempt: int = 0
    deadline: float = 0.0
    """Until when its actor must be heard of."""

    @property
    def lease_id(self) -> str:
        """Name of all its leases."""
        return f"{self.prompt_index:09d}"


def prompt_index_of(lease_id: str) -> int | None:
    """The prompt that a lease id names; None for what is no lease id."""
    if not (lease_id.isascii() and lease_id.isdigit() and len(lease_id) <= MAX_DIGITS):
        return None
    entry = Entry(int(lease_id))
    return entry.prompt_index if entry.lease_id == lease_id else None
