"""The stand-alone actor's loop: prompt -> expand -> score -> file, for several prompts at once.

Waits: for a tree (see `grow`), for the server to be there again after it died (its keeper ends that wait, or the job).
A prompt is tried `MAX_ATTEMPTS` times. One that was being grown when the server died is tried again with nobody beside
it, so that a prompt which kills servers is found, and costs no other prompt its attempts, nor the job its restarts.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from treepo_async.actor.endings import Outcome
from treepo_async.actor.grow import Grower
from treepo_async.actor.output import Output
from treepo_async.actor.tally import Tally
from treepo_async.data.source import Skipped
from treepo_async.engine.client import all_of
from treepo_async.engine.fixed import FixedEngine
from treepo_async.engine.turns import Turns
from treepo_async.errors import DeadlineError, EngineError, TreeError, TreepoError
from treepo_async.types import Prompt, Tree

MAX_ATTEMPTS = 3
BACK_OFF_S = 1.0
MAX_TOLD = 5
"""Skipped records that are told; all of them are in the output."""

log = logging.getLogger(__name__)


class EngineDiedError(EngineError):
    """The server died while a tree was being grown on it."""

    def __init__(self) -> None:
        super().__init__("the engine died while the tree was being grown")


@dataclass
class Generation:
    """Grows the tree of every prompt that has not ended yet."""

    prompts: Iterable[Prompt | Skipped]
    limit: int | None
    grower: Grower
    engine: FixedEngine
    output: Output
    tally: Tally
    max_failed: int
    """Prompts in a row; something else than a prompt is then wrong."""
    _turns: Turns = field(default_factory=Turns)
    _failed_in_a_row: int = 0
    _num_told: int = 0

    async def run(self, concurrent_trees: int) -> None:
        """Return once every prompt has ended.

        Raises:
            TreepoError: too many prompts in a row failed.
            DataError: the output cannot be written.
            WeightsError: the engine's weights are not those they were.
        """
        prompts = self._pending()
        await all_of(self._work(prompts) for _ in range(concurrent_trees))

    def _pending(self) -> Iterator[tuple[Prompt, str]]:
        """Prompts to grow, each with the lease id that it would have as the only source of a run."""
        for index, found in enumerate(islice(self.prompts, self.limit)):
            if self.output.has_ended(found.id):
                continue
            if isinstance(found, Skipped):
                self.output.end(found.id, Outcome.SKIPPED, found.reason)
                self.tally.skipped += 1
                self._tell_skipped(found)
                continue
            yield found, f"{index:09d}"

    def _tell_skipped(self, record: Skipped) -> None:
        self._num_told += 1
        if self._num_told <= MAX_TOLD:
            last = "; more of them are not told" if self._num_told == MAX_TOLD else ""
            log.warning("skipped %s: %s%s", record.id, record.reason, last)

    async def _work(self, prompts: Iterator[tuple[Prompt, str]]) -> None:
        for prompt, lease_id in prompts:
            try:
                tree = await self._grow(prompt, lease_id)
            except (EngineError, DeadlineError, TreeError) as error:
                self._fail(prompt, error)
                continue
            self.output.append(tree)
            self.tally.add(tree)
            self.engine.delivered()
            self._failed_in_a_row = 0

    async def _grow(self, prompt: Prompt, lease_id: str) -> Tree:
        """The tree of a prompt; raises the error of the last attempt."""
        attempt, alone = 1, False
        while True:
            try:
                async with self._alone() if alone else self._turns.shared():
                    return await self._attempt(prompt, lease_id, attempt)
            except (EngineError, DeadlineError, TreeError) as error:
                self.tally.errors += 1
                log.warning("attempt %d at %s failed: %s", attempt, prompt.id, error)
                if attempt == MAX_ATTEMPTS:
                    raise
                alone = alone or isinstance(error, EngineDiedError)
            attempt += 1
            # an engine or a scorer in trouble must not use up prompt after prompt
            await asyncio.sleep(BACK_OFF_S)

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        async with self._turns.alone():
            with self.engine.on_trial():
                yield

    async def _attempt(self, prompt: Prompt, lease_id: str, attempt: int) -> Tree:
        """Grow, and give up as soon as the engine dies."""
        growing = asyncio.ensure_future(
            self.grower.grow(prompt, lease_id=lease_id, attempt=attempt)
        )
        death = asyncio.ensure_future(self.engine.deaths.wait())
        try:
            await asyncio.wait([growing, death], return_when=asyncio.FIRST_COMPLETED)
            if not growing.done():
                raise EngineDiedError
            tree = growing.result()
        finally:
            await _cancelled(growing, death)
        await self.engine.confirm()
        return tree

    def _fail(self, prompt: Prompt, error: TreepoError) -> None:
        reason = f"{MAX_ATTEMPTS} attempts, the last: {type(error).__name__}: {error}"
        self.output.end(prompt.id, Outcome.FAILED, reason)
        self.tally.failed += 1
        # a prompt that killed servers has come to its end, and the next one begins with all restarts
        self.engine.delivered()
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= self.max_failed:
            raise TreepoError(
                f"{self.max_failed} prompts in a row failed (max_failed), the last, {prompt.id}, after {reason}; "
                "when the cause is gone, go on with retry_failed=true"
            )


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """End tasks, whatever they were doing."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
