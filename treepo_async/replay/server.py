"""Replay as a process: one loop around the pure queue.

    receive what is there -> handle it -> hand out leases -> commit -> answer -> hand out batches -> commit -> answer

Waits: for messages from actors and the learner, at most `TICK_S`. A lease or a batch that is not there yet is waited for
on behalf of the asker, who gets an answer within its `wait_s` in any case: what it asked for, or what is missing. Whatever
happens to the queue is followed by a look at who waits, so nobody waits for something that is there.

No answer goes out before what it promises is on disk (`group`), so replay may be killed at any point. Peers send again what
was not answered, and greet the replay that takes its place first. A learner that goes back to a checkpoint gets the same
batches again; only where trees were kept in memory alone are they grown again.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treepo_async.errors import RefusedError, WireError
from treepo_async.metrics.categories import REPLAY
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.metrics.tell import Teller
from treepo_async.replay.askers import Asker, Askers
from treepo_async.replay.batches import Batches
from treepo_async.replay.budget import Budget
from treepo_async.replay.dead_letters import DeadLetters
from treepo_async.replay.deliveries import Deliveries
from treepo_async.replay.entry import State
from treepo_async.replay.feed import TreeFeed
from treepo_async.replay.group import Group
from treepo_async.replay.leases import Leases
from treepo_async.replay.losses import Losses
from treepo_async.replay.peers import Peers
from treepo_async.replay.quarantine import Quarantine
from treepo_async.replay.queue import Queue
from treepo_async.replay.report import report_queue
from treepo_async.replay.store import Store
from treepo_async.types import Prompt
from treepo_async.wire.messages import (
    LEFT,
    Ack,
    AnyMessage,
    AskBatch,
    AskLease,
    Beat,
    Beating,
    GiveUp,
    Hello,
    Message,
    Nack,
    NoBatch,
    NoLease,
    Published,
    PutTree,
    Refusal,
    Retired,
    Trained,
    decode,
    numbered,
    request_of,
)
from treepo_async.wire.sockets import Router

TICK_S = 0.1
GROUP_SIZE = 64
"""Messages of one turn, and so of one commit."""
REPORT_S = 1.0
SLOW_S = 1.0
"""For a commit."""
TOLD_FROM_S = 0.02
"""A turn or a commit that takes less is in the ledger and not in the trace."""
RETRY_S = 1.0
"""After which a peer that was sent away for now comes again."""
TOO_MANY = "too many requests of this peer wait"
MAX_WAIT_S = 60.0
"""No asker is kept waiting longer, whatever it asks for."""


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """Of one replay."""

    vocab_size: int
    max_lost: int
    """Prompts lost in a row that end the run."""
    max_tree_bytes: int
    max_disk_bytes: int
    group_size: int = GROUP_SIZE


@dataclass
class ReplayServer:
    """See the module."""

    router: Router
    queue: Queue
    store: Store
    peers: Peers
    prompt: Callable[[int], Prompt]
    """The training prompt of an index; raises EndOfData, or DataError for one that cannot be used."""
    limits: ServerLimits
    dead_letters: DeadLetters
    quarantine: Quarantine
    make_feed: Callable[[Group], TreeFeed] | None = None
    """Gives the trees of a file; actors then get no lease."""
    num_actors: int = 0
    """Of the run, as `Leases` counts them."""
    clock: Callable[[], float] = time.monotonic
    slot: Slot = field(
        default_factory=lambda: Slot(SlotLedger(REPLAY), "queue", least_s=TOLD_FROM_S)
    )
    """On which its time is booked."""
    _askers: Askers = field(default_factory=Askers)
    _told_at: float = -1e9
    _looked_at: float = -1e9
    _stuck_at: float = 0.0
    """When the disk took a commit last, or first did not."""

    def __post_init__(self) -> None:
        self._group = Group(self.router, self.queue, self.store, self.dead_letters)
        self._batches = Batches(self.queue, self.store)
        self._budget = Budget(self.queue, self._group, self.limits.max_disk_bytes)
        self._losses = Losses(self.queue, self.prompt, self._group, self.limits.max_lost)
        self._deliveries = Deliveries(
            self.queue,
            self.store,
            self._group,
            self.limits.vocab_size,
            self.limits.max_tree_bytes,
        )
        self._feed = None if self.make_feed is None else self.make_feed(self._group)
        self._leases = Leases(
            self.queue,
            self.store,
            self._group,
            self._askers,
            self.peers,
            self.prompt,
            self.num_actors,
        )

        self._write_missing_letters()

    async def run(self) -> None:
        """Serve for ever."""
        teller = Teller(self.slot.ledger, "replay")
        try:
            while True:
                arrived = await self.router.receive_some(
                    limit=self.limits.group_size, timeout_s=TICK_S
                )
                with self.slot("handle", messages=len(arrived)):
                    self._turn(arrived, self.clock())
                teller.tell_if_due()
        finally:
            teller.tell()

    def _turn(self, arrived: Sequence[tuple[bytes, list[bytes]]], now: float) -> None:
        for peer, frames in arrived:
            self._take(peer, frames, now)
        if self._group.is_stuck:
            if self._settle():
                self.queue.postpone(now - self._stuck_at)
            return
        self._look_after(now)
        self._fill(now)
        self._leases.hand_out(now, self._budget.num_fitting)
        if self._settle():
            self._serve_batches(now)
            self._send_away(now)
            self._settle()
        # where the disk did not take it: no deadline goes on until it does
        self._stuck_at = now
        self._report(now)

    def _settle(self) -> bool:
        """As `Group.settle`. A disk that took long over it costs nobody a lease: what was said meanwhile is not heard yet."""
        began = self.clock()
        with self.slot("commit", trees=len(self._group.trees)):
            is_settled = self._group.settle()
        seconds = self.clock() - began
        if seconds > SLOW_S:
            self.queue.postpone(seconds)
        return is_settled

    def _write_missing_letters(self) -> None:
        """About prompts that were given up by a replay that died before it could write that down."""
        written = self.dead_letters.indexes()
        for row in self.store.given_up():
            if row.prompt_index not in written:
                self._losses.write_down(row, row.reason)

    # ---------------------------------------------------------------- messages

    def _take(self, peer: bytes, frames: Sequence[bytes], now: float) -> None:
        """Handle one message, and put its answer with the group's; what cannot wait for the disk is answered at once."""
        request = 0
        try:
            message = decode(frames[0])
            request = message.request
            self._check(peer, message, now)
            answer = self._handle(peer, message, frames[1:], now)
        except RefusedError as error:
            self.router.send_now(peer, numbered(refusal(error), request))
        except WireError as error:
            self._strike(peer, frames, error, now)
            nack = Nack(
                request=request or request_of(frames[0]),
                reason=Refusal.INVALID,
                detail=str(error)[:500],
            )
            self.router.send_now(peer, nack)
        else:
            if isinstance(answer, Beating) or (answer is not None and self._group.is_stuck):
                self.router.send_now(peer, numbered(answer, request))
            elif answer is not None:
                self._group.answer(peer, numbered(answer, request))

    def _check(self, peer: bytes, message: AnyMessage, now: float) -> None:
        """Raise RefusedError where nothing is taken from the peer now."""
        if not isinstance(message, Hello):
            self.peers.check(peer, now)
            self.peers.check_role(peer, message)
        if self._group.is_stuck and not isinstance(message, Hello | Beat):
            raise RefusedError(Refusal.DISK_FULL, "replay cannot write", retry=True)

    def _handle(
        self, peer: bytes, message: AnyMessage, attachment: Sequence[bytes], now: float
    ) -> Message | None:
        """The answer to one message; None where there is none, or not yet."""
        match message:
            case AskLease() if (known := self._leases.answered(peer, message.request)) is not None:
                return known
            case AskLease() | AskBatch():
                # in this order a wait that is not a number becomes the longest one
                deadline = now + min(MAX_WAIT_S, message.wait_s)
                surplus = self._askers.add(Asker(peer, message.request, message, deadline))
                if surplus is not None:
                    self._dismiss(surplus, TOO_MANY)
                return None
            case Beat():
                name = self.peers.name_of(peer)
                return Beating(lost=self.queue.beat(name, message.leases, now))
            case PutTree():
                return Ack(note=self._put(peer, message, attachment))
            case GiveUp():
                self._give_up(peer, message)
            case Trained() | Published() | Retired():
                self._hear_learner(message)
            case Hello():
                self._greet(peer, message, now)
            case _:
                raise WireError(f"{type(message).__name__} is no request to replay")
        return Ack()

    def _greet(self, peer: bytes, hello: Hello, now: float) -> None:
        fenced = self.peers.greet(peer, hello, now)
        self.queue.actors = self.peers.actors()
        if fenced is None or self._group.is_stuck:
            return
        for entry in self.queue.release(fenced):
            self._losses.taken_back(entry, "actor_ended")

    def _put(self, peer: bytes, message: PutTree, attachment: Sequence[bytes]) -> str:
        entry = self.queue.order.live.get(message.lease_id)
        try:
            outcome = self._deliveries.take(message, attachment)
        except WireError as error:
            reason = error.reason if isinstance(error, RefusedError) else Refusal.INVALID
            if entry is not None and entry.state is State.QUARANTINED:
                self._losses.bury(entry, reason)
            else:
                lost = GiveUp(lease_id=message.lease_id, attempt=message.attempt, reason=reason)
                self._give_up(peer, lost)
            raise
        if outcome == "reward_error":
            self._losses.lost(message.lease_id, outcome)
        return outcome

    def _see_off(self, peer: bytes) -> None:
        """An actor ends: it asks for nothing any more, and whatever it holds, known to it or not, goes to others."""
        self._askers.forget(peer)
        self.queue.leave(self.peers.name_of(peer))
        self.peers.leave(peer)
        self.queue.actors = self.peers.actors()

    def _give_up(self, peer: bytes, message: GiveUp) -> None:
        if message.reason == LEFT:
            self._see_off(peer)
            return
        if not self.queue.is_held(message.lease_id, self.peers.name_of(peer)):
            return
        entry = self.queue.order.live[message.lease_id]
        if self.queue.give_up(message.lease_id, message.attempt, message.reason):
            self._losses.bury(entry, message.reason)

    def _hear_learner(self, message: Trained | Published | Retired) -> None:
        match message:
            case Trained():
                self._end_step(message)
            case Published():
                self._batches.publish(message)
            case Retired():
                retired = self.queue.retire(message.step)
                self._group.forget(entry.lease_id for entry in retired)

    def _end_step(self, message: Trained) -> None:
        other = self.queue.end_step(message.step, message.lineage, message.digest)
        if other is not None:
            emit(
                "alarm",
                alarm="a step done again has another result",
                step=message.step,
                lineage=message.lineage,
            )

    def _strike(self, peer: bytes, frames: Sequence[bytes], error: WireError, now: float) -> None:
        if not self.peers.strike(peer, now):
            return
        kept = self.quarantine.keep(str(error), frames)
        if kept:
            # of a flood, some: neither the log nor the disk may grow with what others send
            emit("alarm", alarm="invalid message refused", detail=str(error)[:500], kept=kept)

    # ---------------------------------------------------------------- time

    def _look_after(self, now: float) -> None:
        """What happens by itself, looked for with every tick: leases expire, peers fall silent."""
        if now - self._looked_at < TICK_S:
            return
        self._looked_at = now
        for entry in self.queue.expire(now):
            self._losses.taken_back(entry, "lease_expired")
        if self.peers.forget_silent(now):
            self.queue.actors = self.peers.actors()

    def _report(self, now: float) -> None:
        """Tell the driver how the queue stands."""
        if now - self._told_at < REPORT_S:
            return
        self._told_at = now
        report_queue(self.queue, num_bytes=self.store.num_bytes)

    # ---------------------------------------------------------------- askers

    def _fill(self, now: float) -> None:
        """Let the file answer the leases that there are."""
        if self._feed is not None:
            for lease_id, reason in self._feed.fill(now, self._budget.has_room):
                self._losses.lost(lease_id, reason)

    def _serve_batches(self, now: float) -> None:
        for asker in self._askers.for_batches():
            answer, frames = self._try_batch(asker, now)
            if answer is not None:
                self._askers.done(asker)
                self._group.answer(asker.peer, numbered(answer, asker.number), frames)

    def _try_batch(self, asker: Asker, now: float) -> tuple[Message | None, list[bytes]]:
        """What was asked for, or at the deadline what is missing; None before it."""
        assert isinstance(asker.message, AskBatch), "asks for a batch"
        try:
            found, frames = self._batches.find(asker.message)
        except RefusedError as error:
            return refusal(error), []
        if found is None and now > asker.deadline:
            return NoBatch(reason=self._missing()), []
        return found, frames

    def _missing(self) -> str:
        """What the next batch waits for; ends the run where nothing will ever come."""
        self._budget.check()
        room = "" if self._budget.has_room() else "; no room on disk for more trees"
        return self.queue.missing() + room

    def _dismiss(self, asker: Asker, reason: str) -> None:
        """Let it ask again, if it still wants to."""
        is_lease = isinstance(asker.message, AskLease)
        answer = NoLease(reason=reason) if is_lease else NoBatch(reason=reason)
        self._askers.done(asker)
        self._group.answer(asker.peer, numbered(answer, asker.number))

    def _send_away(self, now: float) -> None:
        """Tell those who got no lease why, once there will be none or they have waited long enough."""
        is_finished = self._feed is not None or self.queue.is_finished()
        for asker in self._askers.for_leases():
            if is_finished:
                answer = NoLease(reason="no prompt is left to grow", final=True)
            elif now > asker.deadline:
                reason = (
                    "the learner is behind"
                    if self._budget.has_room()
                    else "the disk budget is used up"
                )
                answer = NoLease(reason=f"admission: {reason}")
            else:
                continue
            self._askers.done(asker)
            self._group.answer(asker.peer, numbered(answer, asker.number))


def refusal(error: RefusedError) -> Nack:
    """The answer that a refusal becomes."""
    detail = str(error).removeprefix(f"{error.reason}: ")
    # who only has to greet may come again at once
    least_s = 0.0 if error.reason == Refusal.HELLO_FIRST or not error.retry else RETRY_S
    wait_s = max(least_s, error.retry_after_s)
    return Nack(reason=error.reason, detail=detail[:500], retry=error.retry, retry_after_s=wait_s)
