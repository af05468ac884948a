"""How scorers are called by the async rest: one interface, whether they run in processes of their own or in a thread."""

import asyncio
from collections.abc import Sequence
from typing import Protocol, Self

from treepo_async.scoring.failures import Attempt, Failures
from treepo_async.scoring.pool import Pool
from treepo_async.scoring.registry import Scorer, attempt, check_name, get_scorer

INLINE = frozenset({"exact"})
"""Scorers that end in time linear in the length of the text, whatever it is."""


class AsyncScorer(Protocol):
    """Scores without blocking.

    Attributes:
        failures: counts of what has no score.
    """

    failures: Failures

    async def score(self, responses: Sequence[str], answer: str) -> list[float]:
        """The accuracies of responses to one problem, NaN where scoring failed."""
        ...

    async def attempt(self, response: str, answer: str) -> Attempt:
        """Score one response."""
        ...


class Inline:
    """A scorer that can neither hang nor crash, in a thread; the async context does nothing."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.failures = Failures()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def score(self, responses: Sequence[str], answer: str) -> list[float]:
        """The accuracies of responses to one problem, NaN where the scorer raised."""

        def attempts() -> list[Attempt]:
            return [attempt(self._scorer, response, answer) for response in responses]

        # in a thread: many long responses take a while, and other trees go on growing meanwhile
        return [self.failures.note(result) for result in await asyncio.to_thread(attempts)]

    async def attempt(self, response: str, answer: str) -> Attempt:
        """Score one response."""
        result = await asyncio.to_thread(attempt, self._scorer, response, answer)
        self.failures.note(result)
        return result


def open_scorer(name: str, *, workers: int, timeout_s: float) -> Inline | Pool:
    """The scorer of that name, as an async context; see `Pool` for the arguments.

    Raises:
        ConfigError: there is no such scorer. One that cannot be imported is told on entering.
    """
    check_name(name)
    if name in INLINE:
        return Inline(get_scorer(name))
    return Pool(name, workers=workers, timeout_s=timeout_s)


def try_scorer(name: str) -> None:
    """Import the scorer as an actor will, in a process of its own, and end that again; for synchronous callers.

    Raises:
        ConfigError: there is no such scorer, or it cannot be imported.
    """

    async def enter() -> None:
        async with open_scorer(name, workers=1, timeout_s=1.0):
            pass

    asyncio.run(enter())
