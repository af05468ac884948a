"""What replay tells the driver: of each tree that came in, and how the queue stands."""

from collections import Counter

from treepo_async.metrics.events import emit
from treepo_async.replay.entry import State
from treepo_async.replay.queue import Queue
from treepo_async.wire.facts import TreeFacts


def report_facts(facts: TreeFacts, outcome: str) -> None:
    """Tell of every tree that came in: also those that are dropped cost tokens and have an accuracy."""
    cost = facts.provenance
    emit(
        "tree",
        outcome=outcome,
        actor=cost.actor,
        num_leaves=facts.num_leaves,
        accuracy_sum=facts.accuracy_sum,
        num_scored=facts.num_scored,
        decoded_tokens=cost.decoded_tokens,
        delivered_tokens=facts.delivered_tokens,
        wasted_tokens=cost.wasted_tokens,
        cached_tokens=cost.cached_tokens,
        prefix_tokens=cost.prefix_tokens,
        num_requests=cost.num_requests,
        overhead_s=cost.overhead_s,
        grow_s=cost.grow_s,
        num_fallbacks=cost.num_fallbacks,
        num_pruned=cost.num_pruned,
        num_children=cost.num_children,
        num_spilled=cost.num_spilled,
        num_migrated=cost.num_migrated,
        moved_tokens=cost.moved_tokens,
        refilled_tokens=cost.refilled_tokens,
        saved_tokens=cost.saved_tokens,
        weight_sum=facts.weight_sum,
        weighted_tokens=facts.weighted_tokens,
    )


def report_queue(queue: Queue, *, num_bytes: int) -> None:
    """Tell how the queue stands: what the next batch waits for, and who holds how many leases."""
    entries = queue.order.live.values()
    leased = Counter(entry.owner for entry in entries if entry.state is State.LEASED)
    emit(
        "queue",
        next_step=queue.order.next_step,
        published=queue.published,
        missing=queue.missing(),
        leases=dict(sorted(leased.items())),
        accepted=sum(entry.state is State.ACCEPTED for entry in entries),
        waiting=sum(entry.state is State.WAITING for entry in entries),
        actors=sorted(queue.actors),
        bytes=num_bytes,
    )
