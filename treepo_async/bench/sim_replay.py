"""The replay queue in simulated time: the admission rule of `replay.queue` in constant time for each call, and its server.

`SimQueue` has leases, acceptance and batches as `replay.queue.Queue` has them where no lease fails; tests drive both side by
side. A new prompt may be leased while there are fewer live ones (leased or accepted) than

    (published + max_staleness + 1 - next_step) * prompts_per_batch,

up to the last batch of the run, and a batch is the first live ones in lease order, once all of them are accepted.

`SimReplay` is the one thread of the server: messages are handled one after the other, in the order in which they come.
It waits for nothing; who asks for a lease or a batch that cannot be had is answered when it can.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from treepo_async.bench.sim_clock import Clock, Stopwatch
from treepo_async.replay.rules import QueueRules

T = TypeVar("T")


class SimQueue(Generic[T]):
    """Admission and lease order."""

    def __init__(self, rules: QueueRules) -> None:
        self.rules = rules
        self.published = 0
        self.next_step = 0
        self.num_dropped = 0
        self._trees: list[T | None] = []
        """By number of the lease: the tree, or None."""
        self._is_open: list[bool] = []
        """By number of the lease: whether its tree is awaited."""
        self._place = 0
        """Every lease before it is ready, dropped or consumed."""
        self._ready: deque[int] = deque()
        """Accepted leases before `_place`, not consumed."""
        self._num_live = 0
        self._refills = 0

    @property
    def num_leased(self) -> int:
        """Leases ever given."""
        return len(self._is_open)

    def may_lease(self) -> bool:
        """Whether a prompt can be given out."""
        until = min(
            self.published + self.rules.max_staleness + 1,
            self.rules.num_batches,
        )
        return self._num_live < (until - self.next_step) * self.rules.prompts_per_batch

    def lease(self) -> tuple[int, int]:
        """Give out a prompt. Gives its number, and the oldest policy step that may sample."""
        batches_before = self._num_live // self.rules.prompts_per_batch
        self._is_open.append(True)
        self._trees.append(None)
        self._num_live += 1
        least = self.next_step + batches_before - self.rules.max_staleness
        return len(self._is_open) - 1, max(0, least)

    def accept(self, number: int, tree: T, *, has_spread: bool) -> bool:
        """Take a tree. Gives whether it is kept; one without spread makes room for another."""
        self._is_open[number] = False
        can_refill = self._refills < self.rules.max_refills
        is_dropped = not has_spread and self.rules.drop_degenerate and can_refill
        if is_dropped:
            self._refills += 1
            self._num_live -= 1
            self.num_dropped += 1
        else:
            self._trees[number] = tree
        while self._place < len(self._is_open) and not self._is_open[self._place]:
            if self._trees[self._place] is not None:
                self._ready.append(self._place)
            self._place += 1
        return not is_dropped

    def next_batch(self) -> list[T] | None:
        """The trees of the next step, in lease order; None while one is missing."""
        size = self.rules.prompts_per_batch
        if len(self._ready) < size:
            return None
        numbers = [self._ready.popleft() for _ in range(size)]
        batch = [tree for number in numbers if (tree := self._trees[number]) is not None]
        for number in numbers:
            self._trees[number] = None
        self._num_live -= size
        self._refills = 0
        self.next_step += 1
        return batch


@dataclass(frozen=True, slots=True)
class ReplaySpeed:
    """Service times."""

    lease_s: float = 0.0002
    """Of a lease."""
    tree_s: float = 0.0005
    """Of a tree that is delivered, its share of a commit included."""
    batch_tree_s: float = 0.0001
    """Of a tree of a batch that is drawn."""


@dataclass
class SimReplay(Generic[T]):
    """The server."""

    clock: Clock
    speed: ReplaySpeed
    queue: SimQueue[T]
    watch: Stopwatch = field(init=False)
    _busy_until: float = 0.0
    _askers: deque[Callable[[int, int], None]] = field(default_factory=deque)
    _learner: Callable[[list[T]], None] | None = None

    def __post_init__(self) -> None:
        self.busy_s = 0.0

    def lease(self, granted: Callable[[int, int], None]) -> None:
        """Ask for a prompt; `granted` gets its number and its least policy step."""

        def ask() -> None:
            self._askers.append(granted)
            self._answer()

        self._handle(self.speed.lease_s, ask)

    def put(
        self, number: int, tree: T, *, has_spread: bool, acknowledged: Callable[[bool], None]
    ) -> None:
        """Deliver a tree; `acknowledged` gets whether it is kept."""

        def take() -> None:
            is_kept = self.queue.accept(number, tree, has_spread=has_spread)
            acknowledged(is_kept)
            self._answer()

        self._handle(self.speed.tree_s, take)

    def next_batch(self, drawn: Callable[[list[T]], None]) -> None:
        """Ask for the next batch."""

        def ask() -> None:
            self._learner = drawn
            self._answer()

        self._handle(0.0, ask)

    def publish(self, step: int) -> None:
        """A publication is out."""

        def note() -> None:
            self.queue.published = max(self.queue.published, step)
            self._answer()

        self._handle(0.0, note)

    def _handle(self, seconds: float, action: Callable[[], None]) -> None:
        self.busy_s += seconds
        self._busy_until = max(self.clock.now, self._busy_until) + seconds
        self.clock.after(self._busy_until - self.clock.now, action)

    def _answer(self) -> None:
        """Whoever can be answered."""
        if self._learner is not None and (batch := self.queue.next_batch()) is not None:
            drawn, self._learner = self._learner, None
            self._handle(len(batch) * self.speed.batch_tree_s, lambda: drawn(batch))
        while self._askers and self.queue.may_lease():
            self._askers.popleft()(*self.queue.lease())
