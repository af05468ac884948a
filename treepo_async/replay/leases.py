"""Who gets which prompt: leases go to the actor that holds the fewest, and never again to one that failed on the prompt.

At the start actors come one after another, and the first few could take all prompts there are. Until every actor of the run
has had a lease, or for `KEPT_S`, none holds more than its equal share.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from treepo_async.data.source import EndOfData
from treepo_async.errors import DataError
from treepo_async.metrics.events import emit
from treepo_async.replay.askers import Asker, Askers
from treepo_async.replay.entry import Entry
from treepo_async.replay.group import Group
from treepo_async.replay.peers import GUEST_NAME
from treepo_async.replay.queue import Queue
from treepo_async.replay.report import report_facts
from treepo_async.types import Prompt
from treepo_async.wire.facts import facts_of
from treepo_async.wire.messages import Leased, NoLease, Refusal, numbered

KEPT_S = 120.0
"""From the first request for a lease on, the shares of actors that have not had one are kept so long."""


class OldTrees(Protocol):
    """Trees that were too old; see `replay.store.Store`."""

    def holds(self, lease_id: str) -> bool:
        """Whether there is one."""

    def read(self, lease_id: str) -> list[bytes]:
        """Its frames; raises DataError where it is damaged."""


class Names(Protocol):
    """Who is who; see `replay.peers.Peers`."""

    def name_of(self, peer: bytes) -> str:
        """Of a peer that has greeted."""


@dataclass
class Leases:
    """See the module."""

    queue: Queue
    old_trees: OldTrees
    group: Group
    askers: Askers
    names: Names
    prompt: Callable[[int], Prompt]
    num_actors: int = 0
    """Of the run; 0: no share is kept."""
    _served: set[str] = field(default_factory=set)
    """Actors of the run that have had a lease."""
    _kept_until: float = math.inf

    def answered(self, peer: bytes, request: int) -> Leased | NoLease | None:
        """What to say to a request that comes again: the lease that answered it, if it is still out."""
        lease = self.askers.granted.get((peer, request))
        if lease is not None and self.queue.is_leased(lease.lease_id, lease.attempt):
            return lease
        if self.askers.was_answered(peer, request):
            return NoLease(reason="the request was answered before")
        return None

    def hand_out(self, now: float, num_fitting: Callable[[], int]) -> None:
        """Hand out what admission allows, and no more than so many, asked for only where somebody waits."""
        waiting = self.askers.for_leases()
        if not (waiting and self.queue.may_lease()):
            return
        self.askers.refresh(self.queue.is_leased)
        self._kept_until = min(self._kept_until, now + KEPT_S)
        num_granted, num_left = self.askers.count_granted(), num_fitting()
        while waiting and num_left > 0 and self.queue.may_lease():
            asker = min(waiting, key=lambda a: num_granted[a.peer])
            if num_granted[asker.peer] >= self._most_each(now):
                return
            waiting.remove(asker)
            actor = self.names.name_of(asker.peer)
            entry = self._usable(now, actor)
            if entry is not None:
                num_granted[asker.peer] += 1
                num_left -= 1
                if not actor.startswith(GUEST_NAME):
                    self._served.add(actor)
                self._grant(asker, *entry)

    def _most_each(self, now: float) -> float:
        """Leases that one actor may hold."""
        if len(self._served) >= self.num_actors or now > self._kept_until:
            return math.inf
        return math.ceil(self.queue.room() / self.num_actors)

    def _usable(self, now: float, actor: str) -> tuple[Entry, Prompt] | None:
        """A lease on the next prompt that can be used."""
        while self.queue.may_lease(actor):
            entry = self.queue.lease(now, actor)
            try:
                return entry, self.prompt(entry.prompt_index)
            except EndOfData:
                self.queue.end_of_data(entry.lease_id)
            except DataError as error:
                emit("alarm", alarm="prompt skipped", detail=str(error))
                self.queue.skip(entry.lease_id, "bad_prompt")
        return None

    def _grant(self, asker: Asker, entry: Entry, prompt: Prompt) -> None:
        """Promise a lease; one that cannot reach its peer goes to the next who asks."""
        lease = Leased(
            request=asker.number,
            lease_id=entry.lease_id,
            attempt=entry.attempt,
            tries=entry.tries,
            prompt_id=prompt.id,
            text=prompt.text,
            answer=prompt.answer,
            token_ids=prompt.token_ids.tolist(),
            least_step=self.queue.least_step(entry.lease_id),
        )
        self.askers.done(asker)
        self.askers.granted[asker.request] = numbered(lease, asker.number)

        def unsent() -> None:
            self.askers.granted.pop(asker.request, None)
            self.queue.hand_back(lease.lease_id, lease.attempt)

        self.group.answer(asker.peer, lease, self._old_tree(entry), unsent=unsent)

    def _old_tree(self, entry: Entry) -> list[bytes]:
        """Frames of a tree of the prompt that was too old, to keep of it what can be kept; its waste is told once."""
        if not self.old_trees.holds(entry.lease_id):
            return []
        try:
            frames = self.old_trees.read(entry.lease_id)
        except DataError as error:
            emit("alarm", alarm="tree damaged on disk", lease=entry.lease_id, detail=str(error))
            return []
        if entry.tries == 1:
            report_facts(facts_of(frames, vocab_size=None), Refusal.STALE)
        return frames if self.queue.rules.regrow else []
