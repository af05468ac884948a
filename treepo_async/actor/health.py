"""Whether an actor, or the engine it uses, can still be trusted: what its last leases came to, and nothing else."""

from collections import deque
from dataclasses import dataclass, field

from treepo_async.engine.answer import NotFiniteError
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.metrics.events import emit

WINDOW = 100
"""Leases that are looked back on."""
ALARM_SHARE = 0.01
SICK_SHARE = 0.2
LEAST = 20
"""Leases without which a share says nothing."""


@dataclass
class Health:
    """Counts leases; `bad` raises where the actor must end, so that its driver hears why."""

    sick_after: int
    """Failures in a row. Trees that were being grown at once and outlived their deadlines are one: a long evaluation or an
    engine that is started again holds up all of them."""
    num_in_a_row: int = 0
    num_not_finite: int = 0
    """Trees refused for their log-probs, ever."""
    _num_deadlines: int = 0
    """Failures by deadline that were counted."""
    _are_finite: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _is_alarmed: bool = False

    def begin(self) -> int:
        """A lease begins. Gives what `bad` is to be told of it."""
        return self._num_deadlines

    def good(self) -> None:
        """A tree was delivered."""
        self.num_in_a_row = 0
        self._note(is_finite=True)

    def bad(self, error: Exception, begun: int | None = None) -> None:
        """A lease failed.

        Args:
            error: why.
            begun: what `begin` gave; None: just before.

        Raises:
            EngineError: too many did in a row, or too many of the last ones for their log-probs.
        """
        if not isinstance(error, DeadlineError):
            self.num_in_a_row += 1
        elif begun in (None, self._num_deadlines):
            self.num_in_a_row += 1
            self._num_deadlines += 1
        self._note(is_finite=not isinstance(error, NotFiniteError))
        share = 1 - sum(self._are_finite) / len(self._are_finite)
        if len(self._are_finite) >= LEAST and share > SICK_SHARE:
            raise EngineError(
                f"engine is sick: {share:.0%} of the last {len(self._are_finite)} trees had log-probs that are not finite"
            )
        if self.num_in_a_row >= self.sick_after:
            raise EngineError(
                f"{self.num_in_a_row} leases in a row failed (actor.sick_after), the last: {error}"
            )

    def _note(self, *, is_finite: bool) -> None:
        self._are_finite.append(is_finite)
        self.num_not_finite += not is_finite
        number = len(self._are_finite) - sum(self._are_finite)
        is_high = len(self._are_finite) >= LEAST and number > ALARM_SHARE * WINDOW
        if is_high and not self._is_alarmed:
            emit(
                "alarm",
                alarm="the engine gives log-probs that are not finite",
                trees=number,
                of=len(self._are_finite),
            )
        self._is_alarmed = is_high
