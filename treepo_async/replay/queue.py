"""The replay queue as a pure state machine: leases, admission, acceptance, batches in lease order.

Every prompt that is handed out is an entry, in the order of its first lease, and ends in exactly one of trained,
dropped (with a reason) or quarantined:

    leased -> accepted -> consumed -> trained
       |          `-> dropped (degenerate, stale, ...), which makes room for a replacement at once
       `-> waiting (its actor gave up or fell silent) -> leased again ... -> quarantined after `max_attempts`

Staleness is bounded by admission, counted in prompts: an entry may be leased only while

    live entries + consumed < (published + max_staleness + 1) * prompts_per_batch.

A batch is the first `prompts_per_batch` live entries, once all of them are accepted, so an entry's place in the
order decides the step it is trained in, and with it the least policy step its segments may come from. Time comes
in as an argument; nothing here waits.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from treepo_async.errors import RefusedError


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


@dataclass(frozen=True, slots=True)
class QueueRules:
    """The knobs of the queue."""

    prompts_per_batch: int
    max_staleness: int
    num_batches: int
    """Batches of the whole run: no prompt is leased beyond them."""
    lease_timeout_s: float
    max_attempts: int
    drop_degenerate: bool
    max_refills: int
    """Degenerate trees replaced for one batch; beyond it they are trained as they are."""


@dataclass(slots=True)
class Entry:
    """One prompt on its way."""

    lease_id: str
    prompt_index: int
    state: State
    attempt: int = 0
    deadline: float = 0.0
    """Until when its actor must be heard of."""


@dataclass
class Queue:
    """The state machine; see the module."""

    rules: QueueRules
    published: int = 0
    """Policy step of the newest publication."""
    exhausted: bool = False
    """Whether the data has ended: no new prompt will come."""
    entries: dict[str, Entry] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why entries were dropped or quarantined."""
    _live: dict[str, Entry] = field(default_factory=dict)
    _consumed: dict[int, list[Entry]] = field(default_factory=dict)
    """Batches by step, from consumption to publication."""
    _num_consumed: int = 0
    _refills: int = 0
    num_lost: int = 0
    """Prompts in a row that ended without a scored tree."""
    _next_index: int = 0

    # ---------------------------------------------------------------- leases

    def may_lease(self) -> bool:
        """Whether an actor can be given a prompt now, waiting or new."""
        return self._first_waiting() is not None or self._admits()

    def lease(self, now: float) -> Entry:
        """Hand out the first waiting entry, else a new one; only after `may_lease()`."""
        entry = self._first_waiting()
        if entry is None:
            entry = Entry(f"{self._next_index:09d}", self._next_index, State.WAITING)
            self._next_index += 1
            self.entries[entry.lease_id] = self._live[entry.lease_id] = entry
        entry.state = State.LEASED
        entry.attempt += 1
        entry.deadline = now + self.rules.lease_timeout_s
        return entry

    def least_step(self, lease_id: str) -> int:
        """Oldest policy step that the entry's segments may come from."""
        place = self._num_consumed + list(self._live).index(lease_id)
        return max(0, place // self.rules.prompts_per_batch - self.rules.max_staleness)

    def beat(self, lease_ids: list[str], now: float) -> None:
        """Their actor lives."""
        for lease_id in lease_ids:
            entry = self._live.get(lease_id)
            if entry is not None and entry.state is State.LEASED:
                entry.deadline = now + self.rules.lease_timeout_s

    def expire(self, now: float) -> list[Entry]:
        """Take back the leases whose actors have fallen silent."""
        silent = [e for e in self._live.values() if e.state is State.LEASED and e.deadline < now]
        for entry in silent:
            self._take_back(entry, "lease_expired")
        return silent

    def is_leased(self, lease_id: str, attempt: int) -> bool:
        """Whether an actor works on this attempt."""
        entry = self._live.get(lease_id)
        return entry is not None and entry.state is State.LEASED and entry.attempt == attempt

    def give_up(self, lease_id: str, attempt: int, reason: str) -> None:
        """An actor failed on a lease; late words about an older attempt change nothing."""
        if self.is_leased(lease_id, attempt):
            self._take_back(self._live[lease_id], reason)

    def hand_back(self, lease_id: str, attempt: int) -> None:
        """The lease did not reach its actor: another gets it, and the attempt does not count."""
        if self.is_leased(lease_id, attempt):
            entry = self._live[lease_id]
            entry.state = State.WAITING
            entry.attempt -= 1

    # ---------------------------------------------------------------- trees

    def accept(
        self, lease_id: str, attempt: int, *, oldest_step: int, has_spread: bool, is_scored: bool
    ) -> str:
        """Decide on a tree.

        Args:
            lease_id: of the prompt; any attempt may deliver, the first one counts.
            attempt: the one that delivers.
            oldest_step: lowest policy step among its segments.
            has_spread: whether its leaves differ in accuracy.
            is_scored: whether any leaf has a reward.

        Returns:
            `accepted`, `duplicate`, or the reason for which it was dropped.

        Raises:
            RefusedError: the lease is unknown, or the tree too old for it. The lease then waits for another actor,
                unless one works on a later attempt already.
        """
        entry = self.entries.get(lease_id)
        if entry is None:
            raise RefusedError("unknown_lease", f"lease {lease_id} was never given", retry=False)
        if lease_id not in self._live or entry.state is State.ACCEPTED:
            return "duplicate"
        if oldest_step < (least := self.least_step(lease_id)):
            self.give_up(lease_id, attempt, "stale")
            raise RefusedError(
                "stale", f"policy step {oldest_step}, lease {lease_id} needs {least}", retry=False
            )
        if not is_scored:
            self.num_lost += 1
            return self._end(entry, State.DROPPED, "reward_error")
        self.num_lost = 0
        if not has_spread and self.rules.drop_degenerate and self._refills < self.rules.max_refills:
            self._refills += 1
            return self._end(entry, State.DROPPED, "degenerate")
        entry.state = State.ACCEPTED
        return "accepted"

    def skip(self, lease_id: str, reason: str) -> None:
        """End an entry whose prompt cannot be used."""
        self._end(self._live[lease_id], State.DROPPED, reason)

    def end_of_data(self, lease_id: str) -> None:
        """The entry has no prompt: there will be no new ones."""
        self.exhausted = True
        del self._live[lease_id], self.entries[lease_id]

    # ---------------------------------------------------------------- batches

    def next_batch(self, step: int) -> list[Entry] | None:
        """Consume the trees of a step, in lease order; None while one of them is missing.

        Asked again for a step that is not published yet, it gives the same trees.

        Raises:
            RefusedError: the step is neither such a one nor the next.
        """
        if step in self._consumed:
            return self._consumed[step]
        following = self._num_consumed // self.rules.prompts_per_batch
        if step != following:
            raise RefusedError("wrong_step", f"asked for {step}, next is {following}", retry=False)
        first = list(self._live.values())[: self.rules.prompts_per_batch]
        if len(first) < self.rules.prompts_per_batch or any(
            e.state is not State.ACCEPTED for e in first
        ):
            return None
        for entry in first:
            entry.state = State.CONSUMED
            del self._live[entry.lease_id]
        self._consumed[step] = first
        self._num_consumed += len(first)
        self._refills = 0
        return first

    def publish(self, step: int, consumed_step: int) -> None:
        """A publication is out: the batch behind it counts as trained."""
        trained = self._consumed.pop(consumed_step, [])
        for entry in trained:
            entry.state = State.TRAINED
        self.published = max(self.published, step)

    def missing(self) -> str:
        """What the next batch waits for, in words."""
        first = list(self._live.values())[: self.rules.prompts_per_batch]
        states = Counter(e.state for e in first)
        ready = f"{states[State.ACCEPTED]} of {self.rules.prompts_per_batch} trees are in"
        return f"{ready}, {states[State.LEASED]} being grown, {states[State.WAITING]} waiting for an actor"

    def is_over(self) -> bool:
        """Whether the data has ended and can fill no further batch."""
        return self.exhausted and len(self._live) < self.rules.prompts_per_batch

    def is_finished(self) -> bool:
        """Whether no prompt will ever be leased again, unless a tree that is out or in is dropped."""
        taken = len(self._live) + self._num_consumed
        enough = taken >= self.rules.num_batches * self.rules.prompts_per_batch
        settled = all(e.state is State.ACCEPTED for e in self._live.values())
        return settled and (enough or self.exhausted)

    def ledger(self) -> dict[str, int]:
        """How many entries stand in each state, and why the dropped and quarantined ones ended."""
        states = Counter(str(e.state) for e in self.entries.values())
        return {**states, **{f"reason/{reason}": n for reason, n in self.reasons.items()}}

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        live = [e.lease_id for e in self.entries.values() if e.state in LIVE]
        assert live == list(self._live), "live entries in lease order"
        allowed = (self.published + self.rules.max_staleness + 1) * self.rules.prompts_per_batch
        assert len(self._live) + self._num_consumed <= allowed, "admission bound"
        for entry in self.entries.values():
            least = 0 if entry.state is State.WAITING else 1
            assert least <= entry.attempt <= self.rules.max_attempts, "attempts"

    # ---------------------------------------------------------------- inside

    def _admits(self) -> bool:
        size, used = self.rules.prompts_per_batch, len(self._live) + self._num_consumed
        allowed = min(self.published + self.rules.max_staleness + 1, self.rules.num_batches) * size
        return not self.exhausted and used < allowed

    def _first_waiting(self) -> Entry | None:
        return next((e for e in self._live.values() if e.state is State.WAITING), None)

    def _take_back(self, entry: Entry, reason: str) -> None:
        self.reasons[reason] += 1
        if entry.attempt >= self.rules.max_attempts:
            self.num_lost += 1
            self._end(entry, State.QUARANTINED, "too_many_attempts")
        else:
            entry.state = State.WAITING

    def _end(self, entry: Entry, state: State, reason: str) -> str:
        entry.state = state
        self.reasons[reason] += 1
        del self._live[entry.lease_id]
        return reason
