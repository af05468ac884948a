"""Reward errors: what can go wrong with one score, their counts, and a log that they cannot flood.

The invariant: a failed score is NaN, never 0, and every one of them is counted.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from treepo_async.errors import DataError

MAX_DETAIL_CHARS = 4000
"""The end of a longer detail is kept."""

_log = logging.getLogger(__name__)


class Failure(StrEnum):
    """Why a response has no score; `counts_text` reads them as they are spelled here."""

    RAISED = "raised"
    """The scorer raised an exception or called `sys.exit`."""
    TIMED_OUT = "timed_out"
    """It gave no score before the deadline and was killed."""
    DIED = "died"
    """Its process ended: a crash, `os._exit`, out of memory."""
    NOT_FINITE = "not_finite"
    """It returned something that is no finite number, or too large for a float32."""
    BAD_KEY = "bad_key"
    """The answer key cannot be read, so no response can be right or wrong."""


class BadKeyError(DataError):
    """An answer key that cannot be read; a scorer may raise it."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one call of a scorer came to."""

    accuracy: float
    """NaN where it failed."""
    failure: Failure | None = None
    detail: str = ""
    """Of the failure: a traceback, or a sentence."""


def failed(failure: Failure, detail: str) -> Attempt:
    """An attempt that came to nothing."""
    return Attempt(math.nan, failure, detail[-MAX_DETAIL_CHARS:])


def counts_text(counts: Mapping[Failure, int]) -> str:
    """Such as `12 (raised 10, timed out 2)`, the most frequent first; `0` where there are none."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{failure.replace('_', ' ')} {count}" for failure, count in ordered)
    return f"{sum(counts.values())} ({parts})" if parts else "0"


class Failures:
    """Counts failures by reason, and logs few of them.

    Logged are the first one of each reason, with its detail, and the counts when their sum reaches a power of ten.

    Args:
        log: takes a line; by default a warning of this module's logger.
    """

    def __init__(self, log: Callable[[str], None] = _log.warning) -> None:
        self.counts: Counter[Failure] = Counter()
        self._log = log

    def note(self, attempt: Attempt) -> float:
        """Count the attempt if it failed. Gives its accuracy."""
        if attempt.failure is None:
            return attempt.accuracy
        self.counts[attempt.failure] += 1
        if self.counts[attempt.failure] == 1:
            reason = attempt.failure.replace("_", " ")
            self._log(f"a response stays unscored, {reason}: {attempt.detail.rstrip()}")
        elif _is_power_of_ten(self.counts.total()):
            self._log(f"reward errors so far: {counts_text(self.counts)}")
        return attempt.accuracy

    def tell(self) -> None:
        """Log the counts, where there are any."""
        if self.counts:
            self._log(f"reward errors: {counts_text(self.counts)}")


def _is_power_of_ten(number: int) -> bool:
    return str(number).rstrip("0") == "1"
