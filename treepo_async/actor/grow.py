"""One prompt to one scored tree: expansion, then scores; the same for every kind of actor.

Waits: for the engine (see `expand`) and for the scorer (see `score`).
"""

import random
from dataclasses import dataclass

from treepo_async.actor.expand import NO_TRUNK, Engine, ExpandSettings, expand
from treepo_async.actor.score import Scoring, shuffled
from treepo_async.metrics.slots import booked
from treepo_async.tree.regrow import trunk_of
from treepo_async.types import Prompt, Sampling, Tree


@dataclass(frozen=True)
class Grower:
    """Grows the trees of one actor."""

    actor: str
    """Its name, for the provenance of trees."""
    engine: Engine
    settings: ExpandSettings
    scoring: Scoring
    seed: int
    shuffle: bool = False
    """Permute the scores of each tree among its leaves: a control run."""

    async def grow(
        self,
        prompt: Prompt,
        *,
        lease_id: str,
        attempt: int = 1,
        least_step: int = 0,
        old_tree: Tree | None = None,
    ) -> Tree:
        """Grow and score the tree of a prompt.

        Args:
            prompt: the problem.
            lease_id: with `attempt` and the seed it decides forks and fallbacks.
            attempt: to grow it, from 1.
            least_step: oldest policy step that may sample.
            old_tree: of the prompt; what of it is young enough is kept.

        Raises:
            EngineError, DeadlineError: from the engine; nothing of the tree is kept.
        """
        rules = self.settings.growth
        sampling = Sampling(
            temperature=self.settings.sampling.temperature,
            segment_tokens=rules.segment_tokens,
            max_depth=rules.max_depth,
            width=rules.width,
            branching_factor=rules.branching_factor,
            growth=rules.growth,
        )
        trunk = NO_TRUNK
        if old_tree is not None:
            trunk = trunk_of(old_tree, prompt, sampling, rules, least_step)
        segments, provenance = await expand(
            prompt,
            self.engine,
            self.settings,
            self._rng(lease_id, attempt),
            lease_id=lease_id,
            actor=self.actor,
            least_step=least_step,
            trunk=trunk,
        )
        with booked("score"):
            tree = await self.scoring.score(prompt, segments, provenance, sampling)
        return shuffled(tree, self._rng(lease_id, attempt, "shuffle")) if self.shuffle else tree

    def _rng(self, lease_id: str, attempt: int, *purpose: str) -> random.Random:
        """The same for the same lease, whoever holds it."""
        return random.Random("/".join([f"{self.seed}/{lease_id}/{attempt}", *purpose]))
