"""Which surviving paths are pruned at a boundary. Pure; the value of a path is a function that is passed in.

A path that falls under a rule of quality is pruned with `probability`. If it goes on all the same, it stands for those
that would have been pruned in its place: the probability with which it went on is kept on its last segment, and
estimators weigh by its inverse (Horvitz and Thompson, 1952).
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from treepo_async.tree.rules import PartialPath, PruneRules


class Verdict(NamedTuple):
    """What becomes of a path."""

    is_pruned: bool
    inclusion: float = 1.0
    """Probability with which it goes on."""


KEEP, PRUNE = Verdict(is_pruned=False), Verdict(is_pruned=True)


def judge(
    rules: PruneRules,
    path: PartialPath,
    others: Sequence[PartialPath],
    *,
    level: int,
    level_logprob: float,
    rng: random.Random,
) -> Verdict:
    """Judge the quality of a path.

    Args:
        rules: see there.
        path: so far.
        others: all paths of the tree, the path itself included.
        level: its last one.
        level_logprob: mean log-prob of that level, in nats.
        rng: decides where the rules leave it to chance.
    """
    if level < rules.first_level or not _is_poor(rules, path, others, level_logprob):
        return KEEP
    if rng.random() < rules.probability:
        return PRUNE
    return Verdict(is_pruned=False, inclusion=1.0 - rules.probability)


def mean_logprob(path: PartialPath, _others: Sequence[PartialPath] = ()) -> float:
    """Of all tokens of a path: a value that needs no text."""
    return float(np.mean(path.behavior_logprobs, dtype=np.float64))


def _is_poor(
    rules: PruneRules, path: PartialPath, others: Sequence[PartialPath], level_logprob: float
) -> bool:
    if rules.min_logprob is not None and level_logprob < rules.min_logprob:
        return True
    if rules.value is None:
        return False
    value = rules.value(path, others)
    return not math.isnan(value) and value < rules.min_value
