"""The actor's loop: lease -> expand -> score -> put, for several prompts at once.

Waits: for a lease (replay answers every few seconds, with the reason when there is none), for a tree (see `grow`), for
the ack of a tree (replay; sent again until it comes), for an answer to each heartbeat (`replay_client.SILENT_S`; a replay
that is silent is told of once, and growing goes on).

An actor owns nothing that is lost when it dies: its leases expire and go to another. One that is told to end hands them
back first. Work on a lease that replay has taken back is ended at the next heartbeat. An actor whose leases keep failing
ends with the reason (`health`): whoever started it decides what then. Its time is booked by slot, one for each prompt that may
grow at once: see `metrics.categories.ACTOR`.
"""

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Any

from treepo_async import chaos
from treepo_async.actor.grow import Grower
from treepo_async.actor.health import Health
from treepo_async.actor.replay_client import (
    LEASE_WAIT_S,
    LOST,
    POOR,
    SILENT_S,
    ReplayClient,
    prompt_of,
)
from treepo_async.engine.answer import NotFiniteError
from treepo_async.engine.client import all_of
from treepo_async.errors import DeadlineError, EngineError, RefusedError
from treepo_async.metrics.categories import ACTOR
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot, Slots
from treepo_async.types import Tree
from treepo_async.wire.messages import Leased

BEAT_S = 2.0
BACK_OFF_S = 1.0
LEAVE_S = 1.5
"""For handing leases back at the end; less than any role has to end in."""
SICK_AFTER = 8

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Work:
    """A lease, and the task that grows its tree."""

    lease: Leased
    growing: asyncio.Task[Tree]
    begun: int
    """See `Health.begin`."""
    slot: Slot
    """On which its time is booked."""
    is_lost: bool = False

    def lose(self) -> None:
        """Replay has taken the lease back: nobody waits for the tree."""
        self.is_lost = True
        self.growing.cancel()


@dataclass
class Worker:
    """Grows trees until replay has no more prompts."""

    replay: ReplayClient
    grower: Grower
    health: Health = field(default_factory=lambda: Health(SICK_AFTER))
    slots: Slots = field(default_factory=lambda: Slots(SlotLedger(ACTOR)))
    num_lost: int = 0
    """Leases that replay took back while their trees were being grown."""
    _held: dict[str, _Work] = field(default_factory=dict)
    """By lease id, until the lease has come to its end."""

    async def serve(self, concurrent_trees: int) -> None:
        """`run` for ever: a replay that loses trees has them grown again, also after the last prompt.

        Raises:
            EngineError: too many leases failed.
            DeadlineError: replay was gone for too long.
            RefusedError: replay wants nothing of this actor.
        """
        while True:
            await self.run(concurrent_trees)
            await asyncio.sleep(LEASE_WAIT_S)

    async def run(self, concurrent_trees: int) -> None:
        """Keep that many prompts growing until the leases end; what ends it early has all leases handed back."""
        try:
            async with asyncio.TaskGroup() as group:
                beats = group.create_task(self._beat(), name="beats")
                await all_of(self._work(slot) for slot in self.slots.take(concurrent_trees))
                beats.cancel()
        except BaseException:
            await self._leave()
            raise

    async def _work(self, slot: Slot) -> None:
        with slot.current():
            await self._work_on(slot)

    async def _work_on(self, slot: Slot) -> None:
        while (found := await self._lease(slot)) is not None:
            lease, old_tree = found
            if lease.lease_id in self._held:
                # replay took it back and gave it out again before a heartbeat could say so
                self._held[lease.lease_id].lose()
            growing = asyncio.ensure_future(self._grow(lease, old_tree))
            work = _Work(lease, growing, self.health.begin(), slot)
            self._held[lease.lease_id] = work
            await self._finish(work)
            if self._held.get(lease.lease_id) is work:
                # kept where it was not brought to its end, for `_leave`
                del self._held[lease.lease_id]

    async def _lease(self, slot: Slot) -> tuple[Leased, Tree | None] | None:
        with slot("lease"):
            return await self.replay.lease()

    async def _finish(self, work: _Work) -> None:
        """Bring a lease to its end: a tree, a lease given up, or nothing where it is lost."""
        try:
            with work.slot("grow", **_words(work.lease)) as words:
                tree = await work.growing
                words |= _facts(tree)
        except asyncio.CancelledError:
            if not work.is_lost or _is_cancelled():
                raise
            self.num_lost += 1
            log.warning("lease %s was taken back", work.lease.lease_id)
        except (EngineError, DeadlineError) as error:
            await self._fail(work, error, _reason(error))
        else:
            await self._put(work, tree)

    async def _put(self, work: _Work, tree: Tree) -> None:
        lease = work.lease
        chaos.point("actor.before_put")
        try:
            with work.slot("put", **_words(lease)):
                await self.replay.put(lease, tree)
        except RefusedError as error:
            if error.reason not in LOST + POOR:
                raise
            if error.reason in LOST:
                log.warning("tree of lease %s was refused: %s", lease.lease_id, error)
            else:
                await self._fail(work, error, error.reason)
        else:
            chaos.point("actor.after_put")
            self.health.good()

    async def _fail(self, work: _Work, error: Exception, reason: str) -> None:
        """Let another actor try, unless this one must end over it."""
        log.warning("gave up lease %s: %s", work.lease.lease_id, error)
        with work.slot("put", **_words(work.lease), reason=reason):
            await self.replay.give_up(work.lease, reason)
        self.health.bad(error, work.begun)
        # an engine or a scorer in trouble must not use up prompt after prompt
        with work.slot("back_off"):
            await asyncio.sleep(BACK_OFF_S)

    async def _grow(self, lease: Leased, old_tree: Tree | None) -> Tree:
        return await self.grower.grow(
            prompt_of(lease),
            lease_id=lease.lease_id,
            attempt=lease.tries,
            least_step=lease.least_step,
            old_tree=old_tree,
        )

    async def _beat(self) -> None:
        is_silent = False
        while True:
            await asyncio.sleep(BEAT_S)
            # by object: a lease may be given out again, also to this actor, while the answer is on its way
            named = dict(self._held)
            try:
                lost = await self.replay.beat(named)
            except DeadlineError:
                if not is_silent:
                    emit(
                        "alarm",
                        alarm=f"replay has been silent for {SILENT_S:g} s",
                        detail="growing goes on; what is grown is sent once it answers",
                    )
                is_silent = True
                continue
            is_silent = False
            for lease_id in lost:
                if self._held.get(lease_id) is named[lease_id]:
                    named[lease_id].lose()

    async def _leave(self) -> None:
        growing = [work.growing for work in self._held.values()]
        self._held.clear()
        for task in growing:
            task.cancel()
        if not await self.replay.leave(timeout_s=LEAVE_S):
            log.warning("replay did not take the leases back; they will expire")
        if growing:
            # requests are aborted in the engine meanwhile
            await asyncio.wait(growing, timeout=LEAVE_S)


def _words(lease: Leased) -> dict[str, Any]:
    """What the spans of a lease say of it."""
    return {"lease": lease.lease_id, "attempt": lease.attempt}


def _facts(tree: Tree) -> dict[str, Any]:
    """What the span of a tree says of it."""
    versions = [segment.policy_version for segment in tree.segments]
    return {
        "oldest": str(min(versions)),
        "newest": str(max(versions)),
        "leaves": len(tree.leaves),
        "decoded_tokens": tree.provenance.decoded_tokens,
        "requests": tree.provenance.num_requests,
    }


def _reason(error: Exception) -> str:
    """A word for the queue's ledger."""
    if isinstance(error, NotFiniteError):
        return "not_finite"
    return "deadline" if isinstance(error, DeadlineError) else type(error).__name__


def _is_cancelled() -> bool:
    """Whether the current task itself shall end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
