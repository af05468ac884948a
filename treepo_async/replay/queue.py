"""The replay queue as a pure state machine: leases, admission, acceptance, batches in lease order.

Every prompt that is handed out is an entry, in the order of its first lease, and ends in exactly one of trained,
dropped (with a reason) or quarantined:

    waiting -> leased -> accepted -> consumed -> trained     kept until retired, then only counted
       ^          |          |-> dropped (degenerate, ...), which makes room for a replacement at once
       |          |          `-> waiting, when the tree turns out too old for its batch or is damaged on disk
       |          `-> waiting (its actor gave up or fell silent) ... -> quarantined after `max_attempts`
       `- consumed or trained, when the batch is asked for again and its trees are lost (`unconsume`)

Staleness is bounded by admission, counted in prompts: an entry may be leased only while its place among the live
ones is below

    (published + max_staleness + 1 - next_step) * prompts_per_batch.

A batch is the first `prompts_per_batch` live entries, once all of them are accepted, so an entry's place in the
order decides the step it is trained in, and with it the least policy step its segments may come from. Consumed
batches stay available until every checkpoint covers them: a learner that goes back to one of them gets the same trees
in the same order. Where each entry is kept is `order`'s.

A prompt is quarantined after `max_attempts` failed leases of two actors, or of the only one there is; an actor that
failed on a prompt gets it again only where there is no other. `take_changes()` is what must be written down before
anybody is told; a queue made of the whole state goes on where the other stood. Time comes in as an argument; nothing
here waits.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import islice
from typing import Self

from treepo_async.errors import RefusedError
from treepo_async.replay.entry import Entry, State, prompt_index_of
from treepo_async.replay.order import LeaseOrder
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.state import Changes, Counts, QueueState
from treepo_async.replay.steps import Steps

UNHEARD_S = 5.0
"""An actor that got a lease names it in a beat within this time."""
RESTORED_UNHEARD_S = 1.0
"""The same for a lease of an earlier process."""
MIN_ACTORS = 2
"""That failed on a prompt before it is quarantined, where there are as many."""


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
    actors: frozenset[str] = frozenset()
    """Names of those that can be given leases."""
    steps: Steps = field(default_factory=Steps)
    """Of the learner."""
    _refills: int = 0
    _counts: Counts = field(default_factory=Counts)
    """As last taken."""

    @classmethod
    def of(cls, rules: QueueRules, state: QueueState, *, now: float) -> Self:
        """A queue that goes on where another one stood; whoever held a lease has its time anew.

        Where its rules let trees be less old than before, those that are too old for their batches wait for an actor.
        """
        counts = state.counts
        queue = cls(
            rules,
            LeaseOrder.of(state),
            published=counts.published,
            exhausted=counts.exhausted,
            reasons=Counter(counts.reasons),
            num_lost=counts.num_lost,
            steps=Steps.of(counts.lineages, state.steps),
            _refills=counts.refills,
            _counts=counts,
        )
        for entry in queue.order.live.values():
            queue._set_deadlines(entry, now)
            # it was granted by an earlier process, so that its actor can name it next to at once
            entry.granted = now - UNHEARD_S + RESTORED_UNHEARD_S
        queue._reopen_stale(len(queue.order.live))
        return queue

    def state(self) -> QueueState:
        """Where the queue stands."""
        rows = tuple(entry.row() for entry in self.order.kept())
        return QueueState(self._count(), rows, self.steps.rows())

    def take_changes(self) -> Changes | None:
        """What happened since the last call; None for nothing."""
        rows, gone = self.order.take_touched()
        steps = self.steps.take_touched()
        counts, before = self._count(), self._counts
        self._counts = counts
        if not (rows or gone or steps) and counts == before:
            return None
        return Changes(counts, rows, gone, steps)

    # ---------------------------------------------------------------- leases

    def may_lease(self, actor: str = "") -> bool:
        """Whether an actor can be given a prompt now, waiting or new."""
        if self._first_waiting(actor) is not None:
            return True
        return not self.exhausted and len(self.order.live) < self.room()

    def lease(self, now: float, actor: str = "") -> Entry:
        """Hand out the first waiting entry, else a new one; only after `may_lease(actor)`."""
        entry = self._first_waiting(actor) or self.order.new()
        entry.state, entry.owner = State.LEASED, actor
        entry.attempt += 1
        self._set_deadlines(entry, now)
        self.order.touch(entry)
        return entry

    def room(self) -> int:
        """How many entries, from the first live one on, admission lets out."""
        until = min(self.published + self.rules.max_staleness + 1, self.rules.num_batches)
        return max(0, until - self.order.next_step) * self.rules.prompts_per_batch

    def least_step(self, lease_id: str) -> int:
        """Oldest policy step that the entry's segments may come from."""
        return self._least_step_at(list(self.order.live).index(lease_id))

    def beat(self, actor: str, lease_ids: Collection[str], now: float) -> list[str]:
        """An actor lives, and works on these leases. Gives those of them that are not its own any more.

        A lease of its own that it does not name, and has had long enough to name, never reached it: another gets it.
        """
        named = [self.order.live.get(lease_id) for lease_id in lease_ids]
        mine = {e.lease_id for e in named if e is not None and self._is_held(e, actor)}
        for entry in [e for e in self.order.live.values() if self._is_held(e, actor)]:
            if entry.lease_id in mine:
                entry.deadline = now + self.rules.lease_timeout_s
            elif now > entry.granted + UNHEARD_S:
                self.hand_back(entry.lease_id, entry.attempt)
        return sorted({*lease_ids} - mine)

    def expire(self, now: float) -> list[Entry]:
        """Take back the leases whose actors have fallen silent, or whose trees take too long."""
        leased = [entry for entry in self.order.live.values() if entry.state is State.LEASED]
        late = [entry for entry in leased if min(entry.deadline, entry.limit) < now]
        for entry in late:
            is_silent = entry.deadline < now
            self._take_back(entry, "lease_expired" if is_silent else "lease_too_long")
        return late

    def postpone(self, seconds: float) -> None:
        """For so long nothing could be taken: whoever holds a lease has as much more time."""
        for entry in self.order.live.values():
            if entry.state is State.LEASED:
                entry.deadline += seconds
                entry.limit += seconds

    def release(self, actor: str) -> list[Entry]:
        """Take back all leases of an actor that has ended. Gives their entries."""
        held = [entry for entry in self.order.live.values() if self._is_held(entry, actor)]
        for entry in held:
            self._take_back(entry, "actor_ended")
        return held

    def leave(self, actor: str) -> None:
        """An actor ends in order: others get its leases, and these attempts do not count."""
        for entry in [e for e in self.order.live.values() if self._is_held(e, actor)]:
            self.hand_back(entry.lease_id, entry.attempt)

    def is_leased(self, lease_id: str, attempt: int) -> bool:
        """Whether an actor works on this attempt."""
        entry = self.order.live.get(lease_id)
        return entry is not None and entry.state is State.LEASED and entry.attempt == attempt

    def is_held(self, lease_id: str, actor: str) -> bool:
        """Whether the lease is that actor's."""
        entry = self.order.live.get(lease_id)
        return entry is not None and self._is_held(entry, actor)

    def is_open(self, lease_id: str) -> bool:
        """Whether a tree of the lease is wanted."""
        entry = self.order.live.get(lease_id)
        return entry is not None and entry.state is not State.ACCEPTED

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
            entry.state, entry.owner = State.WAITING, ""
            entry.uncounted += 1
            self.order.touch(entry)

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
        entry.state, entry.owner, entry.oldest_step = State.ACCEPTED, "", oldest_step
        self.order.touch(entry)
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
        if self._reopen_stale(size):
            return None
        self._refills = 0
        return self.order.consume(size)

    def end_step(self, step: int, lineage: int, digest: str) -> str | None:
        """The update of a step is made. Gives the digest of an earlier lineage that differs, if there is one.

        Raises:
            RefusedError: the lineage was rolled back, or the step has no batch.
        """
        if step not in self.order.consumed:
            raise RefusedError("wrong_step", f"step {step} has no batch", retry=False)
        return self.steps.end(step, lineage, digest)

    def publish(self, step: int, lineage: int, consumed_step: int) -> None:
        """A publication is out: the batch behind it counts as trained. Again, or an older one, is harmless.

        Raises:
            RefusedError: the lineage was rolled back.
        """
        self.steps.meet(lineage, step)
        batch = self.order.consumed.get(consumed_step, [])
        for entry in batch:
            entry.state = State.TRAINED
        self.order.touch(*batch)
        self.published = max(self.published, step)

    def retire(self, step: int) -> list[Entry]:
        """Every checkpoint covers all batches up to and including `step`. Gives what is not kept any more."""
        self.steps.retire(step)
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
        lost = self.order.unconsume(step, has_tree)
        if lost:
            self.reasons["batch_lost"] += len(lost)
        return lost

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
        self.state().check()
        room = self.room()
        for place, entry in enumerate(self.order.live.values()):
            is_out = entry.state is State.LEASED
            assert not is_out or place < room, "admission bound"
            assert is_out <= entry.tries <= entry.attempt, "attempts"

    # ---------------------------------------------------------------- inside

    def _first_waiting(self, actor: str) -> Entry | None:
        admitted = islice(self.order.live.values(), self.room())
        return next(
            (e for e in admitted if e.state is State.WAITING and self._suits(e, actor)), None
        )

    def _suits(self, entry: Entry, actor: str) -> bool:
        """Whether an actor may try, which one that failed may only where all others have too."""
        return actor not in entry.failed or self.actors <= {*entry.failed}

    @staticmethod
    def _is_held(entry: Entry, actor: str) -> bool:
        return entry.state is State.LEASED and entry.owner == actor

    def _set_deadlines(self, entry: Entry, now: float) -> None:
        entry.granted = now
        entry.deadline = now + self.rules.lease_timeout_s
        entry.limit = now + self.rules.lease_limit_s

    def _take_back(self, entry: Entry, reason: str) -> bool:
        """Whether the prompt is lost, after its last attempt."""
        self.reasons[reason] += 1
        entry.failed = tuple(sorted({*entry.failed, entry.owner}))
        entry.owner = ""
        self.order.touch(entry)
        most = self.rules.max_attempts
        is_shared = len(entry.failed) >= MIN_ACTORS or self.actors <= {*entry.failed}
        if entry.tries < most or not (is_shared or entry.tries >= MIN_ACTORS * most):
            entry.state = State.WAITING
            return False
        self.num_lost += 1
        self._end(entry, State.QUARANTINED, "too_many_attempts")
        return True

    def _least_step_at(self, place: int) -> int:
        batches_before = place // self.rules.prompts_per_batch
        return max(0, self.order.next_step + batches_before - self.rules.max_staleness)

    def _reopen_stale(self, number: int) -> list[Entry]:
        """Those of the first live entries whose trees are too old for their batches wait again.

        Admission prevents it as long as the rules are the same.
        """
        stale = [
            entry
            for place, entry in enumerate(self.order.first(number))
            if entry.state is State.ACCEPTED
            and entry.oldest_step is not None
            and entry.oldest_step < self._least_step_at(place)
        ]
        if stale:
            self.reasons["stale_accepted"] += len(stale)
        return self.order.reopen(stale)

    def _count(self) -> Counts:
        return Counts(
            next_index=self.order.next_index,
            next_step=self.order.next_step,
            published=self.published,
            num_retired=self.order.num_retired,
            refills=self._refills,
            exhausted=self.exhausted,
            num_lost=self.num_lost,
            lineages=dict(self.steps.lineages),
            ended={str(state): number for state, number in self.order.ended.items()},
            reasons={reason: number for reason, number in self.reasons.items() if number},
        )

    def _end(self, entry: Entry, state: State, reason: str) -> str:
        self.order.end(entry, state, reason)
        self.reasons[reason] += 1
        return reason
