"""Trees grown on an engine that stops by chance, with a record of every round."""

import random
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.tree.growth import Extension, Growth, GrowthRules
from treepo_async.types import (
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    StopReason,
    Tree,
    leaves_of,
)

ANSWERED = (StopReason.EOS, StopReason.BOXED)
RULES = GrowthRules(
    segment_tokens=4,
    max_depth=6,
    width=16,
    branching_factor=2,
    first_fork_min=2,
    first_fork_max=2,
    fallback=True,
)


@dataclass
class Round:
    """One planned round and what was known when it was planned."""

    extensions: list[Extension]
    finished: list[int]
    survivors: list[int]
    num_ended: int

    @property
    def num_active(self):
        return sum(e.num_runs for e in self.extensions)


@dataclass
class ScriptedEngine:
    """Runs of numbered tokens, each of which ends its path with probability `stop_rate`."""

    rng: random.Random
    stop_rate: float = 0.0
    reasons: tuple[StopReason, ...] = (*ANSWERED, StopReason.REPETITION)
    update_rate: float = 0.0
    """How often a token is sampled under the other policy version."""
    tokens: count = field(default_factory=count)

    def run(self, max_new_tokens):
        num_tokens, stops = 0, False
        while not stops and num_tokens < max_new_tokens:
            num_tokens, stops = num_tokens + 1, self.rng.random() < self.stop_rate
        spans = tuple(
            VersionSpan(PolicyVersion(0, int(self.rng.random() < self.update_rate)), 1)
            for _ in range(num_tokens)
        )
        if self.update_rate == 0:
            spans = (VersionSpan(PolicyVersion(0, 0), num_tokens),)
        token_ids = np.array([next(self.tokens) for _ in range(num_tokens)], np.int32)
        run = Run(token_ids, np.full(num_tokens, -1.0, np.float32), spans)
        return run, self.rng.choice(self.reasons) if stops else None


def grow(rules, engine, seed=0):
    """Grow one tree to its end. Gives the growth and its rounds."""
    growth, rounds = Growth(rules, random.Random(seed)), []
    survivors, num_ended, most_rounds = [], 0, (rules.width + 1) * rules.max_depth
    while extensions := growth.plan():
        finished = [i for i, s in enumerate(growth.segments) if s.stop is not None]
        rounds.append(Round(extensions, finished, survivors, num_ended))
        assert len(rounds) <= most_rounds, "growth does not end"
        survivors, num_ended = [], 0
        for extension in extensions:
            for _ in range(extension.num_runs):
                growth.add(extension, *engine.run(extension.max_new_tokens))
                last = len(growth.segments) - 1
                if growth.segments[last].stop is None:
                    survivors.append(last)
                else:
                    num_ended += 1
    return growth, rounds


def tree_of(growth):
    num_leaves, rules = len(leaves_of(tuple(growth.segments))), growth.rules
    rewards_L = np.zeros(num_leaves, np.float32)
    return Tree(
        prompt=Prompt("p", np.array([1], np.int32), "", ""),
        segments=tuple(growth.segments),
        rewards_L=rewards_L,
        accuracies_L=rewards_L,
        sampling=Sampling(
            1.0, rules.segment_tokens, rules.max_depth, rules.width, rules.branching_factor
        ),
        provenance=Provenance("lease", "actor", notes=growth.notes()),
    )
