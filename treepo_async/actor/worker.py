"""The actor's loop: lease -> expand -> score -> put, for several prompts at once.

Waits: for a lease (replay answers every few seconds, with the reason when there is none), for the engine (see
`expand`), for the scorer (`timeout_s`), for the ack of a tree (replay; sent again until it comes). An actor owns nothing that is lost when it
dies: its leases expire and go to another.
"""

import asyncio
import logging
import random
from dataclasses import dataclass, field
from functools import partial

from treepo_async.actor.expand import Engine, ExpandSettings, expand
from treepo_async.actor.replay_client import (
    LEASE_WAIT_S,
    ReplayClient,
    is_lost,
    prompt_of,
)
from treepo_async.actor.score import score_tree, shuffled
from treepo_async.engine.client import all_of
from treepo_async.errors import DeadlineError, EngineError, RefusedError
from treepo_async.scoring.registry import Scorer
from treepo_async.types import Sampling, Tree
from treepo_async.wire.messages import Leased

BEAT_S = 2.0
BACK_OFF_S = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RewardSettings:
    """How leaves are scored."""

    scorer: Scorer
    correct: float
    wrong: float
    timeout_s: float
    """Of one tree; a thread that hangs beyond it is left behind."""
    shuffle: bool = False
    """Permute the scores of each tree among its leaves: a control run."""


@dataclass
class Worker:
    """Grows trees until replay has no more prompts."""

    name: str
    replay: ReplayClient
    engine: Engine
    settings: ExpandSettings
    reward: RewardSettings
    seed: int
    _leases: set[str] = field(default_factory=set)

    async def serve(self, concurrent_trees: int) -> None:
        """`run` for ever: a replay that dies has the trees that it lost grown again, also after the last prompt."""
        while True:
            await self.run(concurrent_trees)
            await asyncio.sleep(LEASE_WAIT_S)

    async def run(self, concurrent_trees: int) -> None:
        """Keep that many prompts growing until the leases end."""
        async with asyncio.TaskGroup() as group:
            beats = group.create_task(self._beat(), name="beats")
            await all_of(self._work() for _ in range(concurrent_trees))
            beats.cancel()

    async def _work(self) -> None:
        while (lease := await self.replay.lease()) is not None:
            self._leases.add(lease.lease_id)
            try:
                tree = await self._grow(lease)
                await self.replay.put(lease, tree)
            except (EngineError, DeadlineError) as error:
                log.warning("gave up lease %s: %s", lease.lease_id, error)
                await self.replay.give_up(lease, type(error).__name__)
                # an engine or a scorer in trouble must not use up prompt after prompt
                await asyncio.sleep(BACK_OFF_S)
            except RefusedError as error:
                if not is_lost(error):
                    raise
                log.warning("tree of lease %s was refused: %s", lease.lease_id, error)
            finally:
                self._leases.discard(lease.lease_id)

    async def _grow(self, lease: Leased) -> Tree:
        prompt = prompt_of(lease)
        rules = self.settings.growth
        segments, provenance = await expand(
            prompt,
            self.engine,
            self.settings,
            self._rng(lease),
            lease_id=lease.lease_id,
            actor=self.name,
            least_step=lease.least_step,
        )
        sampling = Sampling(
            temperature=self.settings.sampling.temperature,
            segment_tokens=rules.segment_tokens,
            max_depth=rules.max_depth,
            width=rules.width,
            branching_factor=rules.branching_factor,
        )
        score = partial(
            score_tree,
            prompt,
            segments,
            provenance,
            sampling,
            scorer=self.reward.scorer,
            decode=self.settings.stops.decode,
            correct=self.reward.correct,
            wrong=self.reward.wrong,
        )
        try:
            # in a thread: a user's scorer may be slow, and other trees go on growing meanwhile
            async with asyncio.timeout(self.reward.timeout_s):
                tree = await asyncio.to_thread(score)
        except TimeoutError as error:
            wait = f"the scores of {prompt.id}"
            raise DeadlineError(wait, "reward.scorer", self.reward.timeout_s) from error
        return shuffled(tree, self._rng(lease, "shuffle")) if self.reward.shuffle else tree

    def _rng(self, lease: Leased, *purpose: str) -> random.Random:
        """The same for the same lease, whoever holds it."""
        return random.Random("/".join([f"{self.seed}/{lease.lease_id}/{lease.attempt}", *purpose]))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            await self.replay.beat(self._leases)
