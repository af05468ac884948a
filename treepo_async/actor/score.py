"""From grown segments to a scored tree: text is made here, for the scorer only."""

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from treepo_async.config.schema import RewardConfig
from treepo_async.scoring.async_scorer import AsyncScorer, open_scorer
from treepo_async.scoring.failures import Failure
from treepo_async.scoring.reward import RewardRules, rewards
from treepo_async.types import (
    Float32,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    Trajectory,
    Tree,
    leaves_of,
)


@dataclass(frozen=True)
class Scoring:
    """How leaves are scored."""

    scorer: AsyncScorer
    decode: Callable[[Sequence[int]], str]
    """Tokens to text."""
    rules: RewardRules

    @property
    def failures(self) -> Counter[Failure]:
        """Reward errors by reason, so far."""
        return self.scorer.failures.counts

    async def score(
        self,
        prompt: Prompt,
        segments: tuple[Segment, ...],
        provenance: Provenance,
        sampling: Sampling,
    ) -> Tree:
        """Score every leaf that was not pruned; one whose scorer fails gets NaN, as does a pruned one."""
        unscored = Tree(prompt, segments, _none(segments), _none(segments), sampling, provenance)
        leaves = np.flatnonzero(unscored.is_whole_L).tolist()
        responses = [self.decode(Trajectory(unscored, leaf).token_ids.tolist()) for leaf in leaves]
        accuracies_L = _none(segments)
        accuracies_L[leaves] = await self.scorer.score(responses, prompt.answer)
        rewards_L = rewards(accuracies_L, unscored.num_tokens_L, self.rules)
        tree = replace(unscored, rewards_L=rewards_L, accuracies_L=accuracies_L)
        tree.check()
        return tree


@contextlib.asynccontextmanager
async def open_scoring(
    reward: RewardConfig, *, decode: Callable[[Sequence[int]], str], max_response_tokens: int
) -> AsyncIterator[Scoring]:
    """The scoring of one actor, with its processes.

    Args:
        reward: the section.
        decode: tokens to text.
        max_response_tokens: the response limit.

    Raises:
        ConfigError: there is no such scorer, or it cannot be imported.
    """
    async with open_scorer(
        reward.scorer, workers=reward.workers, timeout_s=reward.timeout_s
    ) as scorer:
        yield Scoring(scorer, decode, RewardRules.of(reward, max_response_tokens))


def shuffled(tree: Tree, rng: random.Random) -> Tree:
    """The tree with its scores permuted among its leaves: the control that has nothing to learn from.

    A leaf gets the reward and the accuracy of one other leaf, or its own, a failed score's NaNs included. Pruned
    leaves stay out of it.
    """
    leaves = np.flatnonzero(tree.is_whole_L).tolist()
    order = rng.sample(leaves, len(leaves))
    rewards_L, accuracies_L = tree.rewards_L.copy(), tree.accuracies_L.copy()
    rewards_L[leaves], accuracies_L[leaves] = tree.rewards_L[order], tree.accuracies_L[order]
    return replace(tree, rewards_L=rewards_L, accuracies_L=accuracies_L)


def _none(segments: tuple[Segment, ...]) -> Float32:
    return np.full(len(leaves_of(segments)), np.nan, dtype=np.float32)
