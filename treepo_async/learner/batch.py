"""From a batch of trees to its updates, on rank 0: log-probs that are needed first, advantages, weights, one update a part.

Neighbours: the worker calls it with each batch, `team` carries out every part on all ranks.

Invariant: what an update needs of the whole batch (whitening, normalizer, bounds of masks) is fixed before any correction acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from treepo_async.learner.geometry import Float64
from treepo_async.learner.normalizer import loss_weights
from treepo_async.learner.result import StepResult, merge
from treepo_async.learner.share import SegmentValues, Share
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion, Tree


class Team(Protocol):
    """What is asked of all ranks; see `team.Team`."""

    def train(self, batch: Share, *, version: PolicyVersion) -> StepResult:
        """Make one update."""

    def logprobs(self, batch: Share, *, of_reference: bool = False) -> list[SegmentValues]:
        """Log-probs of every tree."""


@dataclass(frozen=True, slots=True)
class BatchRules:
    """How a batch becomes updates."""

    estimator: str
    leave_one_out: bool = False
    path_weights: str = "equal"
    whiten: bool = True
    normalizer: str = "token_mean"
    response_limit: int = 0
    """Longest response, in tokens; read by the normalizer `dr_grpo`."""
    num_minibatches: int = 1
    needs_proximal: bool = False
    """Whether log-probs under the weights at the start of the batch are computed first."""
    needs_reference: bool = False


class BatchTrainer:
    """Trains on one batch after another."""

    def __init__(self, team: Team, rules: BatchRules) -> None:
        self._team, self._rules = team, rules

    def train(self, trees: Sequence[Tree], *, version: PolicyVersion) -> StepResult:
        """Make the updates of a batch.

        Args:
            trees: the batch.
            version: the version the current weights were published as.
        """
        advantages = self._advantages(trees)
        # the weights are not read by a forward pass
        whole = Share(tuple(trees), tuple(advantages), tuple(advantages))
        proximal = self._team.logprobs(whole) if self._rules.needs_proximal else []
        reference = (
            self._team.logprobs(whole, of_reference=True) if self._rules.needs_reference else []
        )
        results = []
        for chosen in _parts(len(trees), self._rules.num_minibatches):
            part_trees, part_advantages = trees[chosen], advantages[chosen]
            weights = loss_weights(
                part_trees,
                part_advantages,
                self._rules.normalizer,
                response_limit=self._rules.response_limit,
            )
            part = Share(
                trees=tuple(part_trees),
                advantages=tuple(part_advantages),
                weights=tuple(weights),
                proximal=tuple(proximal[chosen]),
                reference=tuple(reference[chosen]),
            )
            results.append(self._team.train(part, version=version))
        return merge(results)

    def _advantages(self, trees: Sequence[Tree]) -> list[Float64]:
        rules = self._rules
        return batch_advantages(
            trees,
            rules.estimator,
            whitened=rules.whiten,
            leave_one_out=rules.leave_one_out,
            path_weights=rules.path_weights,
        )


def _parts(num_trees: int, num_parts: int) -> list[slice]:
    """Consecutive parts of as equal a size as possible, at most one a tree."""
    bounds = np.linspace(0, num_trees, min(num_parts, num_trees) + 1).round().astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(bounds)]
