"""From a batch of trees to its updates, on rank 0: log-probs that are needed first, advantages, weights, one update a part.

Neighbours: the worker calls it with each batch, `team` carries out every part on all ranks.

Invariant: what an update needs of the whole batch (whitening, normalizer, bounds of masks) is fixed before any weight or mask acts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.loss.result import StepResult, merge
from treepo_async.learner.loss.values import corrected_groups
from treepo_async.learner.packing.bounds import Bounds, bounds_of
from treepo_async.learner.packing.geometry import Float64
from treepo_async.learner.packing.share import SegmentValues, Share
from treepo_async.tree.advantage import MakeGroups, batch_advantages
from treepo_async.types import PolicyVersion, Tree

Result = TypeVar("Result")


class Team(Protocol):
    """What is asked of all ranks; see `team.Team`."""

    def train(self, batch: Share, *, version: PolicyVersion) -> StepResult:
        """Make one update."""

    def logprobs(self, batch: Share, *, of_reference: bool = False) -> list[SegmentValues]:
        """Log-probs of every tree."""

    def keep_waiting(self, work: Callable[[], Result]) -> Result:
        """Do what may take long and concerns rank 0 alone."""


@dataclass(frozen=True, slots=True)
class BatchRules:
    """How a batch becomes updates."""

    estimator: str
    leave_one_out: bool = False
    path_weights: str = "equal"
    whiten: bool = True
    normalizer: str = "token_mean"
    num_minibatches: int = 1
    needs_proximal: bool = False
    """Whether log-probs under the weights at the start of the batch are computed first."""
    needs_reference: bool = False
    needs_bounds: bool = False
    """Whether a mask reads `Bounds`; then `needs_proximal` too."""
    mean_square: float = math.inf
    """Of the mask `m2po`, in nats squared."""
    vtrace_cap: float | None = None
    """Largest factor of a level where values are corrected, then `needs_proximal` too; None: they are not."""
    correct_fresh: bool = False
    """Whether fresh tokens are corrected and masked like others."""


class BatchTrainer:
    """Trains on one batch after another."""

    def __init__(self, team: Team, rules: BatchRules) -> None:
        self._team, self._rules = team, rules

    def train(self, trees: Sequence[Tree], *, version: PolicyVersion) -> StepResult:
        """`updates`, as one result."""
        return merge(self.updates(trees, version=version))

    def updates(self, trees: Sequence[Tree], *, version: PolicyVersion) -> list[StepResult]:
        """Make the updates of a batch. Gives what each did.

        Args:
            trees: the batch.
            version: the version the current weights were published as.
        """
        batch = self._prepare(trees, version)
        parts = _parts(len(trees), self._rules.num_minibatches)
        results = [self._team.train(self._part(batch, part), version=version) for part in parts]
        if batch.proximal is None:
            # the weights have moved since the version was published: what differs is no error of the engine
            results[1:] = [_without_gap(result) for result in results[1:]]
        return results

    def _prepare(self, trees: Sequence[Tree], version: PolicyVersion) -> Share:
        """All trees with what is known of the whole batch; its weights are not those of any update."""
        rules, apart = self._rules, self._team.keep_waiting
        advantages = apart(lambda: self._advantages(trees))
        # the weights are not read by a forward pass
        whole = Share(tuple(trees), tuple(advantages), tuple(advantages))
        if rules.needs_proximal:
            whole = replace(whole, proximal=tuple(self._team.logprobs(whole)))
        if rules.needs_reference:
            reference = self._team.logprobs(whole, of_reference=True)
            whole = replace(whole, reference=tuple(reference))
        return apart(lambda: self._correct(whole, version))

    def _correct(self, batch: Share, version: PolicyVersion) -> Share:
        """Values and bounds, from the proximal log-probs where they are wanted."""
        rules = self._rules
        bounds = self._bounds(batch, version) if rules.needs_bounds else Bounds()
        advantages = batch.advantages
        if rules.vtrace_cap is not None:
            corrected = corrected_groups(
                batch.trees,
                batch.proximal or (),
                version,
                cap=rules.vtrace_cap,
                correct_fresh=rules.correct_fresh,
            )
            advantages = tuple(self._advantages(batch.trees, corrected))
        return replace(batch, advantages=advantages, bounds=bounds)

    def _part(self, batch: Share, chosen: slice) -> Share:
        """The trees of one update."""
        trees, advantages = batch.trees[chosen], batch.advantages[chosen]
        return Share(
            trees=trees,
            advantages=advantages,
            weights=tuple(loss_weights(trees, advantages, self._rules.normalizer)),
            proximal=None if batch.proximal is None else batch.proximal[chosen],
            reference=None if batch.reference is None else batch.reference[chosen],
            bounds=batch.bounds,
        )

    def _advantages(
        self, trees: Sequence[Tree], make_groups: Sequence[MakeGroups] | None = None
    ) -> list[Float64]:
        rules = self._rules
        return batch_advantages(
            trees,
            rules.estimator,
            whitened=rules.whiten,
            leave_one_out=rules.leave_one_out,
            path_weights=rules.path_weights,
            make_groups=make_groups,
        )

    def _bounds(self, batch: Share, version: PolicyVersion) -> Bounds:
        return bounds_of(
            batch.trees,
            batch.advantages,
            batch.proximal or (),
            version,
            mean_square=self._rules.mean_square,
            correct_fresh=self._rules.correct_fresh,
        )


def _parts(num_trees: int, num_parts: int) -> list[slice]:
    """Consecutive parts of as equal a size as possible, at most one a tree."""
    bounds = np.linspace(0, num_trees, min(num_parts, num_trees) + 1).round().astype(int).tolist()
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def _without_gap(result: StepResult) -> StepResult:
    return replace(result, logprob_gap_mean=math.nan, logprob_gap_max=math.nan)
