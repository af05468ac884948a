"""An event loop whose sleeps take no time: its clock jumps to the next thing that is due.

For work that waits for nothing but the clock, as trees grown on an engine that sleeps do. Waits: none; a loop in which nothing
is due would wait for ever, and is ended.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from treepo_async.errors import TreepoError

T = TypeVar("T")


class _Jumping(selectors.SelectSelector):
    """Passes time in place of waiting."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready, and in any case at once."""
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise TreepoError("nothing is due, and nobody would end the wait")
            self.now += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Seconds that have been jumped over."""
        return self._jumping.now


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """The result of work that only sleeps."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
