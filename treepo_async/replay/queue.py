"""The replay queue as a pure state machine: leases, admission, acceptance, batches in lease order.

Every prompt that is handed out is an entry, in the order of its first lease, and ends in exactly one of trained,
dropped (with a reason) or quarantined:

    waiting -> leased -> accepted -> consumed -> trained     kept until retired, then only counted
       ^          |          `-> dropped (degenerate, ...), which makes room for a replacement at once
       |          `-> waiting (its actor gave up or fell silent) ... -> quarantined after `max_attempts`
       `- consumed or trained, when the batch is asked for again and its trees are lost (`unconsume`)

Staleness is bounded by admission, counted in prompts: an entry may be leased only while its place among the live
ones is below

    (published + max_staleness + 1 - next_step) * prompts_per_batch.

A batch is the first `prompts_per_batch` live entries, once all of them are accepted, so an entry's place in the
order decides the step it is trained in, and with it the least policy step its segments may come from. Consumed
batches stay available until a durable checkpoint covers them: a learner that goes back to its last checkpoint gets
the same trees in the same order. Where each entry is kept is `order`'s.

`position()` is all of this but attempts and deadlines; a queue made from it has every live entry waiting. Time comes
in as an argument; nothing here waits.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

from treepo_async.errors import RefusedError
from treepo_async.replay.entry import Entry, State, prompt_index_of
from treepo_async.replay.order import LeaseOrder
from treepo_async.replay.position import QueuePosition
from treepo_async.replay.rules import QueueRules


@dataclass
class Queue:
    """The state machine; see the module."""

    rules: QueueRules
    order: LeaseOrder = field(default_factory=LeaseOrder)
    published: int = 0
    """Policy step of the newest publication."""
    exhausted: bool = False
    """Whether the data has ended: no new prompt will come."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why leases failed, and entries were dropped or quarantined."""
    num_lost: int = 0
    """Prompts in a row that ended without a scored tree."""
    _refills: int = 0

    @classmethod
    def from_position(cls, rules: QueueRules, position: QueuePosition) -> Self:
        """A queue that goes on where another one stood; its live entries wait for actors."""
        return cls(
            rules,
            LeaseOrder.of(position),
            published=position.published,
            exhausted=position.exhausted,
            reasons=Counter(position.reasons),
            _refills=position.refills,
        )

    def position(self) -> QueuePosition:
        """Where the queue stands."""
        return QueuePosition(
            next_index=self.order.next_index,
            next_step=self.order.next_step,
            published=self.published,
            num_retired=self.order.num_retired,
            refills=self._refills,
            exhausted=self.exhausted,
            live=tuple(entry.prompt_index for entry in self.order.live.values()),
            consumed=self.order.batches(),
            ended={str(state): number for state, number in self.order.ended.items()},
            reasons=dict(self.reasons),
        )

    # ---------------------------------------------------------------- leases

    def may_lease(self) -> bool:
        """Whether an actor can be given a prompt now, waiting or new."""
        if self._first_waiting() is not None:
            return True
        return not self.exhausted and len(self.order.live) < self._room()

    def lease(self, now: float) -> Entry:
        """Hand out the first waiting entry, else a new one; only after `may_lease()`."""
        entry = self._first_waiting() or self.order.new()
        entry.state = State.LEASED
        entry.attempt += 1
        entry.deadline = now + self.rules.lease_timeout_s
        return entry

    def least_step(self, lease_id: str) -> int:
        """Oldest policy step that the entry's segments may come from."""
        batches_before = list(self.order.live).index(lease_id) // self.rules.prompts_per_batch
        return max(0, self.order.next_step + batches_before - self.rules.max_staleness)

    def beat(self, lease_ids: list[str], now: float) -> None:
        """Their actor lives."""
        for lease_id in lease_ids:
            entry = self.order.live.get(lease_id)
            if entry is not None and entry.state is State.LEASED:
                entry.deadline = now + self.rules.lease_timeout_s

    def expire(self, now: float) -> list[Entry]:
        """Take back the leases whose actors have fallen silent."""
        silent = [
            e for e in self.order.live.values() if e.state is State.LEASED and e.deadline < now
        ]
        for entry in silent:
            self._take_back(entry, "lease_expired")
        return silent

    def is_leased(self, lease_id: str, attempt: int) -> bool:
        """Whether an actor works on this attempt."""
        entry = self.order.live.get(lease_id)
        return entry is not None and entry.state is State.LEASED and entry.attempt == attempt

    def give_up(self, lease_id: str, attempt: int, reason: str) -> bool:
        """An actor failed on a lease; late words about an older attempt change nothing.

        Returns:
            Whether that was the last attempt, and the prompt is lost.
        """
        if not self.is_leased(lease_id, attempt):
            return False
        return self._take_back(self.order.live[lease_id], reason)

    def hand_back(self, lease_id: str, attempt: int) -> None:
        """The lease did not reach its actor: another gets it, and the attempt does not count."""
        if self.is_leased(lease_id, attempt):
            entry = self.order.live[lease_id]
            entry.state = State.WAITING
            entry.attempt -= 1

    # ---------------------------------------------------------------- trees

    def accept(
        self,
        lease_id: str,
        attempt: int,
        *,
        oldest_step: int | None,
        has_spread: bool,
        is_scored: bool,
    ) -> str:
        """Decide on a tree.

        Args:
            lease_id: of the prompt; any attempt may deliver, the first one counts.
            attempt: the one that delivers.
            oldest_step: lowest policy step among its segments; None for a tree of no policy of the run, which
                cannot be too old.
            has_spread: whether its leaves differ in accuracy.
            is_scored: whether any leaf has a reward.

        Returns:
            `accepted`, `duplicate`, or the reason for which it was dropped.

        Raises:
            RefusedError: the lease is unknown, or the tree too old for it. The lease then waits for another actor,
                unless one works on a later attempt already.
        """
        entry = self.order.live.get(lease_id)
        if entry is None:
            index = prompt_index_of(lease_id)
            if index is None or index >= self.order.next_index:
                raise RefusedError(
                    "unknown_lease", f"lease {lease_id} was never given", retry=False
                )
        if entry is None or entry.state is State.ACCEPTED:
            return "duplicate"
        if oldest_step is not None and oldest_step < (least := self.least_step(lease_id)):
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
        self._end(self.order.live[lease_id], State.DROPPED, reason)

    def lose(self, lease_id: str, reason: str) -> None:
        """End an entry that should have had a tree."""
        self.num_lost += 1
        self.skip(lease_id, reason)

    def end_of_data(self, lease_id: str) -> None:
        """The entry has no prompt: there will be no new ones. The newest one counts as never leased."""
        self.exhausted = True
        entry = self.order.live[lease_id]
        if entry.prompt_index == self.order.next_index - 1:
            self.order.forget_newest()
        else:
            self._end(entry, State.DROPPED, "end_of_data")

    # ---------------------------------------------------------------- batches

    def next_batch(self, step: int) -> list[Entry] | None:
        """Consume the trees of a step, in lease order; None while one of them is missing.

        Asked again for a step that is not retired yet, it gives the same trees.

        Raises:
            RefusedError: the step is neither such a one nor the next.
        """
        if step in self.order.consumed:
            return self.order.consumed[step]
        following = self.order.next_step
        if step != following:
            raise RefusedError("wrong_step", f"asked for {step}, next is {following}", retry=False)
        size = self.rules.prompts_per_batch
        first = self.order.first(size)
        if len(first) < size or any(e.state is not State.ACCEPTED for e in first):
            return None
        self._refills = 0
        return self.order.consume(size)

    def publish(self, step: int, consumed_step: int) -> None:
        """A publication is out: the batch behind it counts as trained. Again, or an older one, is harmless."""
        for entry in self.order.consumed.get(consumed_step, []):
            entry.state = State.TRAINED
        self.published = max(self.published, step)

    def retire(self, step: int) -> list[Entry]:
        """A durable checkpoint covers all batches up to and including `step`. Gives what is not kept any more."""
        return self.order.retire(step)

    def unconsume(self, step: int, has_tree: Callable[[str], bool]) -> list[Entry]:
        """Trees of a consumed batch are lost: it and all later ones are live again, before all others.

        Args:
            step: of the batch.
            has_tree: whether the tree of a lease is still there; its entry needs no actor again.

        Returns:
            The entries whose trees must be grown again.
        """
        self._refills = 0
        return self.order.unconsume(step, has_tree)

    def missing(self) -> str:
        """What the next batch waits for, in words."""
        states = Counter(e.state for e in self.order.first(self.rules.prompts_per_batch))
        ready = f"{states[State.ACCEPTED]} of {self.rules.prompts_per_batch} trees are in"
        return f"{ready}, {states[State.LEASED]} being grown, {states[State.WAITING]} waiting for an actor"

    def is_over(self) -> bool:
        """Whether the data has ended and can fill no further batch."""
        return self.exhausted and len(self.order.live) < self.rules.prompts_per_batch

    def is_finished(self) -> bool:
        """Whether no prompt will ever be leased again, unless a tree that is out or in is dropped or lost."""
        num_batches = max(0, self.rules.num_batches - self.order.next_step)
        number = num_batches * self.rules.prompts_per_batch
        wanted = self.order.first(number)
        enough = len(wanted) == number
        return all(e.state is State.ACCEPTED for e in wanted) and (enough or self.exhausted)

    def ledger(self) -> dict[str, int]:
        """How many entries stand in each state, and why the dropped and quarantined ones ended."""
        states = {str(state): number for state, number in self.order.count().items()}
        return {**states, **{f"reason/{reason}": n for reason, n in self.reasons.items()}}

    def check_integrity(self) -> None:
        """Assert what must hold between any two calls."""
        self.position().check()
        room = self._room()
        for place, entry in enumerate(self.order.live.values()):
            is_out = entry.state is State.LEASED
            assert not is_out or place < room, "admission bound"
            assert is_out <= entry.attempt <= self.rules.max_attempts, "attempts"

    # ---------------------------------------------------------------- inside

    def _room(self) -> int:
        """How many entries, from the first live one on, admission lets out."""
        until = min(self.published + self.rules.max_staleness + 1, self.rules.num_batches)
        return max(0, until - self.order.next_step) * self.rules.prompts_per_batch

    def _first_waiting(self) -> Entry | None:
        admitted = islice(self.order.live.values(), self._room())
        return next((e for e in admitted if e.state is State.WAITING), None)

    def _take_back(self, entry: Entry, reason: str) -> bool:
        """Whether the prompt is lost, after its last attempt."""
        self.reasons[reason] += 1
        if entry.attempt < self.rules.max_attempts:
            entry.state = State.WAITING
            return False
        self.num_lost += 1
        self._end(entry, State.QUARANTINED, "too_many_attempts")
        return True

    def _end(self, entry: Entry, state: State, reason: str) -> str:
        self.order.end(entry, state)
        self.reasons[reason] += 1
        return reason
