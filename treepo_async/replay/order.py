"""All prompts of a run in the order of their first lease, each in exactly one place.

    next_index ... -> live -> consumed by a step -> retired: only counted
                        |          `-> live again, at the front, where its tree is lost
                        `-> ended otherwise: only counted

Nothing is lost and nothing counted twice: the live ones, the consumed ones and the counts add up to `next_index`.
What has ended is counted, not kept, so memory does not grow with the run. `queue` decides what moves when; whatever
changed since the last `take_touched` is remembered for whoever writes it down.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Self

from treepo_async.replay.entry import LIVE, Entry, Row, State
from treepo_async.replay.state import QueueState


@dataclass
class LeaseOrder:
    """See the module."""

    next_index: int = 0
    """Prompts ever leased, and the index of the next."""
    next_step: int = 0
    """Step whose batch is consumed next."""
    num_retired: int = 0
    """Batches that every checkpoint covers."""
    live: dict[str, Entry] = field(default_factory=dict)
    """By lease id, in order."""
    consumed: dict[int, list[Entry]] = field(default_factory=dict)
    """Batches by step, from consumption until they are retired."""
    ended: Counter[State] = field(default_factory=Counter)
    _touched: dict[int, Entry | None] = field(default_factory=dict)

    @classmethod
    def of(cls, state: QueueState) -> Self:
        """The order of a state."""
        counts = state.counts
        order = cls(counts.next_index, counts.next_step, counts.num_retired)
        entries = [Entry.of(row) for row in state.rows]
        order.live = {entry.lease_id: entry for entry in entries if entry.state in LIVE}
        order.consumed = {step: [] for step in range(counts.num_retired, counts.next_step)}
        for entry in entries:
            if entry.step is not None:
                order.consumed[entry.step].append(entry)
        order.ended.update({State(name): number for name, number in counts.ended.items()})
        return order

    def touch(self, *entries: Entry) -> None:
        """They changed."""
        self._touched.update({entry.prompt_index: entry for entry in entries})

    def take_touched(self) -> tuple[tuple[Row, ...], tuple[int, ...]]:
        """Rows of all entries that changed since the last call, and indexes that count as never leased."""
        touched, self._touched = self._touched, {}
        rows = tuple(entry.row() for entry in touched.values() if entry is not None)
        return rows, tuple(index for index, entry in touched.items() if entry is None)

    def new(self) -> Entry:
        """A further entry, the last one."""
        entry = Entry(self.next_index)
        self.next_index += 1
        self.live[entry.lease_id] = entry
        self.touch(entry)
        return entry

    def end(self, entry: Entry, state: State, reason: str) -> None:
        """A live entry leaves."""
        entry.state, entry.reason, entry.owner = state, reason, ""
        del self.live[entry.lease_id]
        self.ended[state] += 1
        self.touch(entry)

    def forget_newest(self) -> None:
        """The newest entry, which is live, counts as never leased."""
        self.next_index -= 1
        del self.live[Entry(self.next_index).lease_id]
        self._touched[self.next_index] = None

    def first(self, number: int) -> list[Entry]:
        """The first live entries, at most `number`."""
        return list(islice(self.live.values(), number))

    def consume(self, number: int) -> list[Entry]:
        """The first live entries become the batch of the next step."""
        batch = self.consumed[self.next_step] = self.first(number)
        for entry in batch:
            entry.state, entry.step = State.CONSUMED, self.next_step
            del self.live[entry.lease_id]
        self.next_step += 1
        self.touch(*batch)
        return batch

    def retire(self, step: int) -> list[Entry]:
        """Count the batches up to and including `step` as trained for good. Gives their entries."""
        steps = [kept for kept in self.consumed if kept <= step]
        retired = [entry for kept in steps for entry in self.consumed.pop(kept)]
        for entry in retired:
            entry.state = State.TRAINED
        self.touch(*retired)
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
        for entry in returned:
            entry.state, entry.step = State.ACCEPTED, None
        self.live = {entry.lease_id: entry for entry in [*returned, *self.live.values()]}
        self.next_step = min(step, self.next_step)
        self.touch(*returned)
        return self.reopen(entry for entry in returned if not has_tree(entry.lease_id))

    def reopen(self, entries: Iterable[Entry]) -> list[Entry]:
        """Live entries wait for an actor again, as if nobody had tried yet. Gives them."""
        reopened = list(entries)
        for entry in reopened:
            entry.state, entry.uncounted, entry.failed = State.WAITING, entry.attempt, ()
            entry.owner, entry.oldest_step = "", None
        self.touch(*reopened)
        return reopened

    def kept(self) -> Iterator[Entry]:
        """The entries that are not only counted, in order: consumed, then live."""
        return chain(chain.from_iterable(self.consumed.values()), self.live.values())

    def count(self) -> Counter[State]:
        """Number of entries in each state, of all prompts ever leased."""
        return Counter(entry.state for entry in self.kept()) + self.ended
