"""Scoring processes: responses are scored in parallel, and a scorer that hangs or dies costs its response only.

For `math` and for user functions; `exact` needs no process, see `async_scorer`. Waits: for an idle process (each becomes idle
within `timeout_s` and a start), and what `child` waits for.
"""

import asyncio
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from treepo_async.scoring.child import Child
from treepo_async.scoring.failures import Attempt, Failures


class Pool:
    """`workers` processes with one scorer, as an async context.

    Args:
        name: of the scorer.
        workers: processes.
        timeout_s: of one response, from when a process takes it.
    """

    def __init__(self, name: str, *, workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._children = [Child(name) for _ in range(workers)]
        self._idle: asyncio.Queue[Child] = asyncio.Queue()
        self.failures = Failures()

    async def __aenter__(self) -> Self:
        """Start all processes.

        Raises:
            ConfigError: the scorer cannot be imported.
        """
        starts = [asyncio.ensure_future(child.start()) for child in self._children]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self._close()
            raise
        for child in self._children:
            self._idle.put_nowait(child)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()
        self.failures.tell()

    async def score(self, responses: Sequence[str], answer: str) -> list[float]:
        """The accuracies of responses to one problem, NaN where scoring failed.

        Raises:
            ConfigError: in a group; a process died and a new one did not start.
        """
        async with asyncio.TaskGroup() as tasks:
            attempts = [tasks.create_task(self.attempt(text, answer)) for text in responses]
        return [attempt.result().accuracy for attempt in attempts]

    async def attempt(self, response: str, answer: str) -> Attempt:
        """Score one response; the failure, if any, is counted."""
        child = await self._idle.get()
        try:
            result = await child.attempt(response, answer, self._timeout_s)
        finally:
            self._idle.put_nowait(child)
        self.failures.note(result)
        return result

    async def _close(self) -> None:
        await asyncio.gather(*(child.close() for child in self._children))
