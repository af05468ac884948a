"""Replay as a process: one loop around the pure queue.

Waits: for messages from actors and the learner. A lease or a batch that is not there yet is waited for on behalf
of the asker, who gets an answer within its `wait_s` in any case: what it asked for, or what is missing. Whatever
happens to the queue is followed by `_serve_waiting`, so nobody waits for something that is there.
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
from treepo_async.replay.queue import Entry, Queue, State
from treepo_async.replay.spool import Spool
from treepo_async.tree.advantage import has_spread
from treepo_async.types import Prompt, Tree
from treepo_async.wire.codec import ARRAYS, decode_tree
from treepo_async.wire.messages import (
    PROTOCOL,
    Ack,
    AnyMessage,
    AskBatch,
    AskLease,
    Batch,
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
)
from treepo_async.wire.sockets import Router

TICK_S = 0.25
MAX_WAIT_S = 60.0
"""No asker is kept waiting longer, whatever it asks for."""
FRAMES_PER_TREE = 2 + len(ARRAYS)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """Somebody who asked for what is not there yet."""

    peer: bytes
    message: AskLease | AskBatch
    deadline: float


@dataclass
class ReplayServer:
    """See the module."""

    router: Router
    queue: Queue
    spool: Spool
    prompt: Callable[[int], Prompt]
    """The training prompt of an index; raises EndOfData, or DataError for one that cannot be used."""
    run_id: str
    vocab_size: int
    max_lost: int
    """Prompts lost in a row that end the run."""
    _waiting: dict[tuple[bytes, int], _Waiting] = field(default_factory=dict)
    _granted: dict[tuple[bytes, int], Leased] = field(default_factory=dict)
    """Leases that are out, by the request they answered: a request sent twice must not take two."""

    async def run(self) -> None:
        """Serve for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._tick(), name="replay ticks")
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
                self._check_lost(entry.lease_id, "lease_expired")
            self._granted = {
                key: lease
                for key, lease in self._granted.items()
                if self.queue.is_leased(lease.lease_id, lease.attempt)
            }
            await self._serve_waiting()

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
            return _refusal(message, error)
        except WireError as error:
            emit("alarm", alarm="invalid tree refused", detail=str(error))
            return Nack(request=message.request, reason="invalid", detail=str(error))

    def _handle(
        self, peer: bytes, message: AnyMessage, attachment: Sequence[bytes]
    ) -> Message | None:
        match message:
            case AskLease() if (peer, message.request) in self._granted:
                return self._granted[peer, message.request]
            case AskLease() | AskBatch():
                # in this order a wait that is not a number becomes the longest one
                deadline = time.monotonic() + min(MAX_WAIT_S, message.wait_s)
                self._waiting.setdefault((peer, message.request), _Waiting(peer, message, deadline))
                return None
            case Beat():
                self.queue.beat(message.leases, time.monotonic())
                return None
            case PutTree():
                return Ack(request=message.request, note=self._put(message, attachment))
            case GiveUp():
                self.queue.give_up(message.lease_id, message.attempt, message.reason)
                self._check_lost(message.lease_id, message.reason)
            case Published():
                self.queue.publish(message.step, message.consumed_step)
            case Retired():
                self.spool.retire(message.step)
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
            oldest_step=min(s.policy_version.step for s in tree.segments),
            has_spread=has_spread(tree),
            is_scored=bool(np.isfinite(tree.rewards_L).any()),
        )
        if outcome == "accepted":
            self.spool.append(message.lease_id, attachment)
        if outcome == "reward_error":
            self._check_lost(message.lease_id, outcome)
        if outcome != "duplicate":
            _report(tree, outcome)
        return outcome

    def _check_lost(self, lease_id: str, reason: str) -> None:
        """Alarm a prompt that is lost; end the run when nothing else happens any more."""
        entry = self.queue.entries.get(lease_id)
        if entry is None or entry.state not in (State.QUARANTINED, State.DROPPED):
            return
        if self.queue.num_lost:
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
        for key, waiting in list(self._waiting.items()):
            if key not in self._waiting:
                continue
            answer, attachment = self._try(waiting)
            if answer is None:
                continue
            del self._waiting[key]
            was_sent = await self.router.send(waiting.peer, answer, attachment)
            if isinstance(answer, Leased):
                self._after_lease(key, answer, was_sent=was_sent)

    def _after_lease(self, key: tuple[bytes, int], lease: Leased, *, was_sent: bool) -> None:
        """Remember a lease that went out; nothing more is handed to a peer that could not be reached."""
        if was_sent:
            self._granted[key] = lease
            return
        self.queue.hand_back(lease.lease_id, lease.attempt)
        for other in [other for other in self._waiting if other[0] == key[0]]:
            del self._waiting[other]

    def _try(self, waiting: _Waiting) -> tuple[Message | None, list[bytes]]:
        """What was asked for, or at the deadline what is missing; None before it."""
        message = waiting.message
        attachment: list[bytes] = []
        if isinstance(message, AskLease):
            found = self._lease(message)
        else:
            found, attachment = self._batch(message)
        if found is None and time.monotonic() > waiting.deadline:
            found = self._missing(message)
        return found, attachment

    def _missing(self, message: AskLease | AskBatch) -> Message:
        if isinstance(message, AskLease):
            return NoLease(request=message.request, reason="admission: the learner is behind")
        return NoBatch(request=message.request, reason=self.queue.missing())

    def _lease(self, message: AskLease) -> Message | None:
        """A lease on the next prompt that can be used."""
        while self.queue.may_lease():
            entry = self.queue.lease(time.monotonic())
            prompt = self._prompt_of(entry)
            if prompt is not None:
                return Leased(
                    request=message.request,
                    lease_id=entry.lease_id,
                    attempt=entry.attempt,
                    prompt_id=prompt.id,
                    text=prompt.text,
                    answer=prompt.answer,
                    token_ids=prompt.token_ids.tolist(),
                    least_step=self.queue.least_step(entry.lease_id),
                )
        if self.queue.is_finished():
            return NoLease(request=message.request, reason="no prompt is left to grow", final=True)
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

    def _batch(self, message: AskBatch) -> tuple[Message | None, list[bytes]]:
        try:
            entries = self.queue.next_batch(message.step)
        except RefusedError as error:
            return _refusal(message, error), []
        if entries is None:
            reason = "the data has ended" if self.queue.is_over() else None
            return (
                NoBatch(request=message.request, reason=reason, final=True) if reason else None
            ), []
        lease_ids = [entry.lease_id for entry in entries]
        self.spool.journal(message.step, lease_ids)
        frames = [frame for lease_id in lease_ids for frame in self.spool.read(lease_id)]
        batch = Batch(
            request=message.request,
            step=message.step,
            lease_ids=lease_ids,
            frames_per_tree=FRAMES_PER_TREE,
            ledger=self.queue.ledger(),
        )
        return batch, frames


def _refusal(message: Message, error: RefusedError) -> Nack:
    detail = str(error).removeprefix(f"{error.reason}: ")
    return Nack(request=message.request, reason=error.reason, detail=detail, retry=error.retry)


def _report(tree: Tree, outcome: str) -> None:
    """Tell the driver of every tree: also those that are dropped cost tokens and have an accuracy."""
    known = tree.accuracies_L[np.isfinite(tree.accuracies_L)]
    cost = tree.provenance
    emit(
        "tree",
        outcome=outcome,
        actor=cost.actor,
        num_leaves=len(tree.leaves),
        accuracy_sum=float(known.sum()),
        num_scored=len(known),
        decoded_tokens=cost.decoded_tokens,
        delivered_tokens=tree.num_delivered_tokens,
        wasted_tokens=cost.wasted_tokens,
        cached_tokens=cost.cached_tokens,
        prefix_tokens=cost.prefix_tokens,
        num_requests=cost.num_requests,
        overhead_s=cost.overhead_s,
        grow_s=cost.grow_s,
        num_fallbacks=cost.num_fallbacks,
    )
