"""Where a process's time goes: seconds by activity, summing to the wall time."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TimeLedger:
    """Seconds by activity since the last `close`; time under no activity is `other`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._opened = clock()
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Book the time inside the `with` under `activity`; activities do not nest."""
        begin = self._clock()
        try:
            yield
        finally:
            self._seconds[activity] += self._clock() - begin

    def close(self) -> dict[str, float]:
        """Seconds by activity, with `wall` and `other`, and start over."""
        now = self._clock()
        wall = now - self._opened
        seconds = {**self._seconds, "other": wall - sum(self._seconds.values()), "wall": wall}
        self._opened, self._seconds = now, defaultdict(float)
        return seconds
