"""Trees grown on an engine that stops by chance, with a record of every round."""

import random
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.tree.growing import Extension
from treepo_async.tree.growth import start_growth
from treepo_async.tree.rules import GrowthRules
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
    fallback="random",
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
    publish_rate: float = 0.0
    """How often a token is sampled under a later policy version than all before it."""
    logprobs: tuple[float, float] = (-1.0, -1.0)
    """Range from which each run's log-prob is drawn, the same for all its tokens."""
    tokens: count = field(default_factory=count)
    step: int = 0

    def entropy(self):
        return self.rng.random()

    def run(self, max_new_tokens):
        num_tokens, stops = 0, False
        while not stops and num_tokens < max_new_tokens:
            num_tokens, stops = num_tokens + 1, self.rng.random() < self.stop_rate
        spans = tuple(
            VersionSpan(PolicyVersion(0, int(self.rng.random() < self.update_rate)), 1)
            for _ in range(num_tokens)
        )
        if self.publish_rate:
            spans = tuple(VersionSpan(self._later(), 1) for _ in range(num_tokens))
        elif self.update_rate == 0:
            spans = (VersionSpan(PolicyVersion(0, 0), num_tokens),)
        token_ids = np.array([next(self.tokens) for _ in range(num_tokens)], np.int32)
        logprobs = np.full(num_tokens, self.rng.uniform(*self.logprobs), np.float32)
        run = Run(token_ids, logprobs, spans)
        return run, self.rng.choice(self.reasons) if stops else None

    def _later(self):
        self.step += self.rng.random() < self.publish_rate
        return PolicyVersion(0, self.step)


def grow(rules, engine, seed=0, prune=None):
    """Grow one tree in rounds to its end. Gives the growth and its rounds."""
    growth, rounds = start_growth(rules, random.Random(seed), prune), []
    survivors, num_ended, most_rounds = [], 0, 2 * (rules.width + 1) * rules.max_depth
    extensions = growth.start()
    while extensions:
        rounds.append(Round(extensions, list(growth.tree.finished), survivors, num_ended))
        assert len(rounds) <= most_rounds, "growth does not end"
        num_before, following = len(growth.tree.segments), []
        for extension in extensions:
            for _ in range(extension.num_runs):
                assert following == [], "the next round began before the end of this one"
                following = add(growth, engine, extension)
        segments = growth.tree.segments
        parents = {s.parent for s in segments}
        ends = [i for i in range(num_before, len(segments)) if i not in parents]
        survivors = [i for i in ends if segments[i].stop is None]
        num_ended, extensions = len(ends) - len(survivors), following
    return growth, rounds


def grow_eagerly(rules, engine, seed=0, prune=None):
    """Grow one tree whose runs come back in random order. Gives the growth and, for each moment, its active runs."""
    growth, order = start_growth(rules, random.Random(seed), prune), random.Random(seed + 1)
    active, moments = growth.start(), []
    while active:
        moments.append((len(growth.tree.finished), list(active)))
        assert len(moments) <= 4 * rules.width * rules.max_depth, "growth does not end"
        extension = active.pop(order.randrange(len(active)))
        active += add(growth, engine, extension)
    return growth, moments


def add(growth, engine, extension):
    """Give a growth one run of the engine's for a request of its own."""
    return growth.add(extension, *engine.run(extension.max_new_tokens), entropy=engine.entropy())


def tree_of(growth):
    num_leaves, rules = len(leaves_of(tuple(growth.tree.segments))), growth.rules
    rewards_L = np.zeros(num_leaves, np.float32)
    return Tree(
        prompt=Prompt("p", np.array([1], np.int32), "", ""),
        segments=tuple(growth.tree.segments),
        rewards_L=rewards_L,
        accuracies_L=rewards_L,
        sampling=Sampling(
            1.0, rules.segment_tokens, rules.max_depth, rules.width, rules.branching_factor
        ),
        provenance=Provenance("lease", "actor", notes=growth.notes()),
    )
