"""One slot of a ledger: what it is at, given by nested `with`s, of which the innermost counts.

The slot that a task works for travels in the task's context, as a cancellation does: whoever scores a leaf or stands at a
gate books it on the slot of the tree, without being given one. Where there is none nothing is booked.

Invariant: a slot is in one activity at any time. It is the innermost that was begun and not ended; `gate` instead while
at least one of its requests stands at a closed gate and none is in an engine; `evaluate` instead of any wait while the process
evaluates.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from treepo_async.metrics.categories import EVALUATE, GATE, OTHER, WAITS
from treepo_async.metrics.ledger import Row, SlotLedger

_SLOT: ContextVar["Slot | None"] = ContextVar("slot", default=None)


@dataclass(eq=False)
class Slot:
    """See the module."""

    ledger: SlotLedger
    track: str
    """Its name in the trace."""
    least_s: float = 0.0
    """What took less is not in the trace."""
    _begun: list[list[str]] = field(default_factory=list)
    """Activities from the outermost to the innermost; each is its own object, as two may have one name."""
    _rest: str = OTHER
    _booked: str = OTHER
    _num_at_gate: int = 0
    _num_in_flight: int = 0
    _is_evaluating: bool = False
    _at_gate_since: float = 0.0

    @contextlib.contextmanager
    def __call__(self, activity: str, **args: Any) -> Iterator[dict[str, Any]]:
        """Be at an activity. Gives the arguments that its span gets in the trace, to add to."""
        begin, entry = self.ledger.clock(), [activity]
        self._begun.append(entry)
        self._settle()
        try:
            yield args
        finally:
            # by identity: tasks of one slot may end in another order than they began
            self._begun = [other for other in self._begun if other is not entry]
            self._settle()
            self._note(activity, begin, args, of=activity)

    @contextlib.contextmanager
    def part(self, name: str, **args: Any) -> Iterator[None]:
        """Show a part of what it is at in the trace; nothing else is booked."""
        begin = self.ledger.clock()
        try:
            yield
        finally:
            self._note(name, begin, args, of=self._booked)

    def rest(self, activity: str) -> None:
        """What it is at from now on while nothing is begun: for what is seen and not done by this process."""
        self._rest = activity
        self._settle()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Be the slot of the current task, and of those it starts."""
        token = _SLOT.set(self)
        try:
            yield
        finally:
            _SLOT.reset(token)

    @contextlib.contextmanager
    def at_gate(self) -> Iterator[None]:
        """One of its requests may not go to an engine yet."""
        self._num_at_gate += 1
        self._settle()
        try:
            yield
        finally:
            self._num_at_gate -= 1
            self._settle()

    @contextlib.contextmanager
    def in_flight(self) -> Iterator[None]:
        """One of its requests is in an engine."""
        self._num_in_flight += 1
        self._settle()
        try:
            yield
        finally:
            self._num_in_flight -= 1
            self._settle()

    def evaluate(self, is_evaluating: bool) -> None:
        """Its process begins or ends an evaluation."""
        self._is_evaluating = is_evaluating
        self._settle()

    def _settle(self) -> None:
        """Book a change, if there is one."""
        wanted = self._wanted()
        if wanted == self._booked:
            return
        if self._booked == GATE:
            self._note(GATE, self._at_gate_since, {}, of=GATE)
        self.ledger.move(self._booked, wanted)
        self._booked = wanted
        if wanted == GATE:
            self._at_gate_since = self.ledger.clock()

    def _wanted(self) -> str:
        activity = self._begun[-1][0] if self._begun else self._rest
        if self._num_at_gate and not self._num_in_flight:
            activity = GATE
        if self._is_evaluating and self.ledger.activities[activity] in WAITS:
            return EVALUATE
        return activity

    def _note(self, name: str, begin: float, args: dict[str, Any], *, of: str) -> None:
        category = self.ledger.activities[of]
        seconds = self.ledger.clock() - begin
        if seconds >= self.least_s:
            self.ledger.note(Row(self.track, name, category, begin, seconds, args))


class Slots:
    """All slots of a process."""

    def __init__(self, ledger: SlotLedger) -> None:
        """Begin with one."""
        self.ledger = ledger
        self._slots = [Slot(ledger, "slot-0")]
        self._is_evaluating = False

    def take(self, num_slots: int) -> list[Slot]:
        """The slots of a process that from now on has that many; none of those that go may be at anything."""
        for number in range(len(self._slots), num_slots):
            self._slots.append(Slot(self.ledger, f"slot-{number}"))
        for slot in self._slots:
            slot.evaluate(False)
        self._slots = self._slots[:num_slots]
        self.ledger.resize(num_slots)
        for slot in self._slots:
            slot.evaluate(self._is_evaluating)
        return self._slots

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The process evaluates, beside what its slots are at."""
        self._evaluate(True)
        try:
            yield
        finally:
            self._evaluate(False)

    def _evaluate(self, is_evaluating: bool) -> None:
        self._is_evaluating = is_evaluating
        for slot in self._slots:
            slot.evaluate(is_evaluating)


@contextlib.contextmanager
def booked(activity: str) -> Iterator[None]:
    """Be at an activity, on the slot of the current task."""
    slot = _SLOT.get()
    with contextlib.nullcontext() if slot is None else slot(activity):
        yield


@contextlib.contextmanager
def at_gate() -> Iterator[None]:
    """`Slot.at_gate` of the current task's."""
    slot = _SLOT.get()
    with contextlib.nullcontext() if slot is None else slot.at_gate():
        yield


@contextlib.contextmanager
def in_flight() -> Iterator[None]:
    """`Slot.in_flight` of the current task's."""
    slot = _SLOT.get()
    with contextlib.nullcontext() if slot is None else slot.in_flight():
        yield
