"""Replay as a process: one loop around the pure queue.

Waits: for messages from actors and the learner. A lease or a batch that is not there yet is waited for on behalf
of the asker, who gets an answer within its `wait_s` in any case: what it asked for, or what is missing. Whatever
happens to the queue is followed by `_serve_waiting`, so nobody waits for something that is there.

Survives its own death: the queue's position is on disk before a batch goes out and before `Published` and `Retired`
are answered, else within a second, and peers send again what was not answered. Started anew, it

    hands out again what was leased or accepted, under the same lease ids; a tree grown before its death counts;
    refuses the tree of a lease younger than its last position (the actor drops it), and gives the lease anew;
    takes `Published` for a batch whose trees are gone, since the learner had them;
    has the trees of a batch that is asked for once more grown again, with those of all later batches (an alarm).

A learner that goes back to its checkpoint waits for none of this: consumed batches are kept until retired.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from treepo_async.data.source import EndOfData
from treepo_async.errors import DataError, RefusedError, TreepoError, WireError
from treepo_async.metrics.events import emit
from treepo_async.replay.askers import Asker, Askers
from treepo_async.replay.batches import Batches
from treepo_async.replay.entry import Entry, State
from treepo_async.replay.feed import TreeFeed
from treepo_async.replay.position_files import PositionFiles
from treepo_async.replay.queue import Queue
from treepo_async.replay.report import report_tree
from treepo_async.replay.spool import Spool
from treepo_async.tree.advantage import has_spread
from treepo_async.types import Prompt, Tree
from treepo_async.wire.codec import decode_tree
from treepo_async.wire.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    AskBatch,
    AskLease,
    Beat,
    GiveUp,
    Hello,
    Leased,
    Message,
    Nack,
    NoBatch,
    NoLease,
    Published,
    PutTree,
    Retired,
    decode,
    numbered,
)
from treepo_async.wire.sockets import Router

TICK_S = 0.25
POSITION_S = 1.0
"""How old the position on disk is at most."""
MAX_WAIT_S = 60.0
"""No asker is kept waiting longer, whatever it asks for."""

log = logging.getLogger(__name__)


@dataclass
class ReplayServer:
    """See the module."""

    router: Router
    queue: Queue
    spool: Spool
    positions: PositionFiles
    prompt: Callable[[int], Prompt]
    """The training prompt of an index; raises EndOfData, or DataError for one that cannot be used."""
    run_id: str
    vocab_size: int
    max_lost: int
    """Prompts lost in a row that end the run."""
    feed: TreeFeed | None = None
    """Trees of a file; actors then get no lease."""
    _askers: Askers = field(default_factory=Askers)
    _batches: Batches = field(init=False)

    def __post_init__(self) -> None:
        self._batches = Batches(self.queue, self.spool, self.positions)

    async def run(self) -> None:
        """Serve for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick(), name="replay ticks")
            tasks.create_task(self._keep_position(), name="replay position")
            while True:
                peer, frames = await self.router.receive()
                answer = self._answer(peer, frames)
                if answer is not None:
                    await self.router.send(peer, answer)
                await self._serve_waiting()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for entry in self.queue.expire(time.monotonic()):
                emit("alarm", alarm="lease expired", lease=entry.lease_id, state=str(entry.state))
                if entry.state is State.QUARANTINED:
                    self._on_lost(entry.lease_id, "lease_expired")
            await self._serve_waiting()

    async def _keep_position(self) -> None:
        while True:
            await asyncio.sleep(POSITION_S)
            self.positions.write(self.queue.position())

    def _answer(self, peer: bytes, frames: Sequence[bytes]) -> Message | None:
        """The answer to one message; None where there is none, or not yet."""
        try:
            message = decode(frames[0])
        except WireError as error:
            log.warning("refused a message from %r: %s", peer, error)
            return Nack(reason="invalid", detail=str(error))
        try:
            return self._handle(peer, message, frames[1:])
        except RefusedError as error:
            return numbered(_refusal(error), message.request)
        except WireError as error:
            emit("alarm", alarm="invalid tree refused", detail=str(error))
            return Nack(request=message.request, reason="invalid", detail=str(error))

    def _handle(
        self, peer: bytes, message: AnyMessage, attachment: Sequence[bytes]
    ) -> Message | None:
        match message:
            case AskLease() if (peer, message.request) in self._askers.granted:
                return self._askers.granted[peer, message.request]
            case AskLease() | AskBatch():
                # in this order a wait that is not a number becomes the longest one
                deadline = time.monotonic() + min(MAX_WAIT_S, message.wait_s)
                step = message.step if isinstance(message, AskBatch) else None
                self._askers.add(Asker(peer, message.request, step, deadline))
                return None
            case Beat():
                self.queue.beat(message.leases, time.monotonic())
                return None
            case PutTree():
                return Ack(request=message.request, note=self._put(message, attachment))
            case GiveUp():
                if self.queue.give_up(message.lease_id, message.attempt, message.reason):
                    self._on_lost(message.lease_id, message.reason)
            case Published():
                self._batches.publish(message)
            case Retired():
                self._batches.retire(message.step)
            case Hello():
                self._check_hello(message)
            case _:
                raise WireError(f"{type(message).__name__} is no request to replay")
        return Ack(request=message.request)

    def _check_hello(self, hello: Hello) -> None:
        if hello.run_id != self.run_id or hello.protocol != PROTOCOL:
            raise RefusedError(
                "wrong_run",
                f"{hello.name} is of run {hello.run_id} with protocol {hello.protocol}, "
                f"this is run {self.run_id} with protocol {PROTOCOL}",
                retry=False,
            )

    def _put(self, message: PutTree, attachment: Sequence[bytes]) -> str:
        """Check, decide, then store: a tree is acknowledged only after it is in the spool."""
        try:
            tree = decode_tree(attachment, vocab_size=self.vocab_size)
            self._check_claims(message, tree)
        except WireError:
            self.queue.give_up(message.lease_id, message.attempt, "invalid")
            raise
        outcome = self.queue.accept(
            message.lease_id,
            message.attempt,
            oldest_step=min(s.policy_version.step for s in tree.whole_segments),
            has_spread=has_spread(tree),
            is_scored=bool(np.isfinite(tree.rewards_L).any()),
        )
        if outcome == "accepted":
            self.spool.append(message.lease_id, attachment)
        if outcome == "reward_error":
            self._on_lost(message.lease_id, outcome)
        if outcome != "duplicate":
            report_tree(tree, outcome)
        return outcome

    def _on_lost(self, lease_id: str, reason: str) -> None:
        """Alarm a prompt that ended without a tree; end the run when nothing else happens any more."""
        emit("alarm", alarm="prompt lost", lease=lease_id, reason=reason)
        if self.queue.num_lost >= self.max_lost:
            raise TreepoError(
                f"{self.queue.num_lost} prompts in a row were lost, the last by {reason}; see the actors' logs"
            )

    def _check_claims(self, message: PutTree, tree: Tree) -> None:
        """What a tree says of itself must fit its lease and what has been published."""
        if tree.provenance.lease_id != message.lease_id:
            raise WireError(
                f"provenance.lease_id is {tree.provenance.lease_id}, delivered for {message.lease_id}"
            )
        # the learner publishes a moment before it says so
        known = self.queue.published + 1
        newest = max(s.policy_version.step for s in tree.segments)
        if newest > known:
            raise WireError(f"step_S has {newest}, but policy step {known} is the newest there is")

    async def _serve_waiting(self) -> None:
        """Answer whoever can be answered: batches first, since one whose trees are lost gives leases to hand out."""
        self._feed()
        for asker in self._askers.for_batches():
            answer, frames = self._try_batch(asker)
            if answer is not None:
                await self._answer_asker(asker, answer, frames)
        if self._askers.for_leases():
            await self._hand_out()
            await self._send_away()

    def _feed(self) -> None:
        """Let the file answer the leases that there are."""
        if self.feed is not None:
            for lease_id, reason in self.feed.fill(time.monotonic()):
                self._on_lost(lease_id, reason)

    def _try_batch(self, asker: Asker) -> tuple[Message | None, list[bytes]]:
        """What was asked for, or at the deadline what is missing; None before it."""
        assert asker.step is not None, "asks for a batch"
        try:
            found, frames = self._batches.find(asker.step)
        except RefusedError as error:
            return _refusal(error), []
        if found is None and time.monotonic() > asker.deadline:
            return NoBatch(reason=self.queue.missing()), []
        return found, frames

    async def _hand_out(self) -> None:
        """Hand out leases, each to who holds the fewest."""
        self._askers.refresh(self.queue.is_leased)
        num_granted = self._askers.count_granted()
        while self.queue.may_lease() and (askers := self._askers.for_leases()):
            neediest = min(askers, key=lambda asker: num_granted[asker.peer])
            lease = self._lease()
            if lease is not None:
                num_granted[neediest.peer] += 1
                await self._grant(neediest, lease)

    async def _send_away(self) -> None:
        """Tell those who got no lease why, once there will be none or they have waited long enough."""
        is_finished = self.feed is not None or self.queue.is_finished()
        for asker in self._askers.for_leases():
            if is_finished:
                answer = NoLease(reason="no prompt is left to grow", final=True)
                await self._answer_asker(asker, answer)
            elif time.monotonic() > asker.deadline:
                answer = NoLease(reason="admission: the learner is behind")
                await self._answer_asker(asker, answer)

    async def _grant(self, asker: Asker, lease: Leased) -> None:
        """Send a lease; one that cannot reach its peer goes to the next who asks."""
        self._askers.granted[asker.request] = numbered(lease, asker.number)
        if not await self._answer_asker(asker, lease):
            del self._askers.granted[asker.request]
            self.queue.hand_back(lease.lease_id, lease.attempt)

    async def _answer_asker(
        self, asker: Asker, answer: Message, frames: Sequence[bytes] = ()
    ) -> bool:
        """Whether the answer went out."""
        self._askers.waiting.pop(asker.request, None)
        return await self.router.send(asker.peer, numbered(answer, asker.number), frames)

    def _lease(self) -> Leased | None:
        """A lease on the next prompt that can be used."""
        while self.queue.may_lease():
            entry = self.queue.lease(time.monotonic())
            prompt = self._prompt_of(entry)
            if prompt is not None:
                return Leased(
                    lease_id=entry.lease_id,
                    attempt=entry.attempt,
                    prompt_id=prompt.id,
                    text=prompt.text,
                    answer=prompt.answer,
                    token_ids=prompt.token_ids.tolist(),
                    least_step=self.queue.least_step(entry.lease_id),
                )
        return None

    def _prompt_of(self, entry: Entry) -> Prompt | None:
        try:
            return self.prompt(entry.prompt_index)
        except EndOfData:
            self.queue.end_of_data(entry.lease_id)
        except DataError as error:
            emit("alarm", alarm="prompt skipped", detail=str(error))
            self.queue.skip(entry.lease_id, "bad_prompt")
        return None


def _refusal(error: RefusedError) -> Nack:
    detail = str(error).removeprefix(f"{error.reason}: ")
    return Nack(reason=error.reason, detail=detail, retry=error.retry)
