"""All prompts of a run in the order of their first lease, each in exactly one place.

    next_index ... -> live -> consumed by a step -> retired: only counted
                        |          `-> live again, at the front, where its tree is lost
                        `-> ended otherwise: only counted

Nothing is lost and nothing counted twice: the live ones, the consumed ones and the counts add up to `next_index`.
What has ended is counted, not kept, so memory does not grow with the run. `queue` decides what moves when.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Self

from treepo_async.replay.entry import Entry, State
from treepo_async.replay.position import ConsumedBatch, QueuePosition


@dataclass
class LeaseOrder:
    """See the module."""

    next_index: int = 0
    """Prompts ever leased, and the index of the next."""
    next_step: int = 0
    """Step whose batch is consumed next."""
    num_retired: int = 0
    """Batches that a durable checkpoint covers."""
    live: dict[str, Entry] = field(default_factory=dict)
    """By lease id, in order."""
    consumed: dict[int, list[Entry]] = field(default_factory=dict)
    """Batches by step, from consumption until they are retired."""
    ended: Counter[State] = field(default_factory=Counter)

    @classmethod
    def of(cls, position: QueuePosition) -> Self:
        """The order of a position: its live entries wait, the others are in their batches."""
        order = cls(position.next_index, position.next_step, position.num_retired)
        order.live = {entry.lease_id: entry for entry in map(Entry, position.live)}
        for batch in position.consumed:
            state = State.TRAINED if batch.is_trained else State.CONSUMED
            order.consumed[batch.step] = [Entry(index, state) for index in batch.prompts]
        order.ended.update({State(state): number for state, number in position.ended.items()})
        return order

    def new(self) -> Entry:
        """A further entry, the last one."""
        entry = Entry(self.next_index)
        self.next_index += 1
        self.live[entry.lease_id] = entry
        return entry

    def end(self, entry: Entry, state: State) -> None:
        """A live entry leaves."""
        entry.state = state
        del self.live[entry.lease_id]
        self.ended[state] += 1

    def forget_newest(self) -> None:
        """The newest entry, which is live, counts as never leased."""
        self.next_index -= 1
        del self.live[Entry(self.next_index).lease_id]

    def first(self, number: int) -> list[Entry]:
        """The first live entries, at most `number`."""
        return list(islice(self.live.values(), number))

    def consume(self, number: int) -> list[Entry]:
        """The first live entries become the batch of the next step."""
        batch = self.consumed[self.next_step] = self.first(number)
        self.next_step += 1
        for entry in batch:
            entry.state = State.CONSUMED
            del self.live[entry.lease_id]
        return batch

    def retire(self, step: int) -> list[Entry]:
        """Count the batches up to and including `step` as trained for good. Gives their entries."""
        steps = [kept for kept in self.consumed if kept <= step]
        retired = [entry for kept in steps for entry in self.consumed.pop(kept)]
        self.ended[State.TRAINED] += len(retired)
        self.num_retired += len(steps)
        return retired

    def unconsume(self, step: int, has_tree: Callable[[str], bool]) -> list[Entry]:
        """Return the batches from `step` on to the front; entries whose tree is lost wait, the others are accepted.

        Returns:
            The entries that wait.
        """
        steps = [kept for kept in self.consumed if kept >= step]
        returned = [entry for kept in steps for entry in self.consumed.pop(kept)]
        lost = [entry for entry in returned if not has_tree(entry.lease_id)]
        for entry in returned:
            entry.state = State.ACCEPTED
        for entry in lost:
            entry.state, entry.attempt = State.WAITING, 0
        self.live = {entry.lease_id: entry for entry in [*returned, *self.live.values()]}
        self.next_step = step
        return lost

    def kept(self) -> Iterator[Entry]:
        """The entries that are not only counted, in order: consumed, then live."""
        return chain(chain.from_iterable(self.consumed.values()), self.live.values())

    def count(self) -> Counter[State]:
        """Number of entries in each state, of all prompts ever leased."""
        return Counter(entry.state for entry in self.kept()) + self.ended

    def batches(self) -> tuple[ConsumedBatch, ...]:
        """The consumed batches by prompt index."""
        return tuple(
            ConsumedBatch(
                step,
                tuple(entry.prompt_index for entry in entries),
                is_trained=all(entry.state is State.TRAINED for entry in entries),
            )
            for step, entries in self.consumed.items()
        )
