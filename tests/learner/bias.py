"""How much of the bias of stale data each correction removes, by enumeration: `python -m tests.learner.bias` prints the table of
`docs/corrections.md`.

Responses have three tokens of a vocabulary of three, so there are 27, and every expectation is a sum. A policy is a table of logits. It
makes 8 exact gradient steps; data come from the policy before them (lag 8), the gradient is that of the policy after them. The tree holds
all 27 responses, each with its probability under the behavior policy for its weight, and goes through packing and the objective like
any other, so what is measured is the code and not a formula. Bias is the distance to the gradient on-policy.

Two problems: in `apart`, a token's reward depends on itself and its place alone, and the policy is one distribution a place. In `joint`,
each response has a reward of its own, drawn at random, and the policy is one distribution for each context.
"""

import itertools
import statistics
from dataclasses import dataclass, replace

import numpy as np
import torch

from treepo_async.learner.loss.objective import LossSettings, Objective
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.edges import Edges
from treepo_async.learner.packing.pack import pack
from treepo_async.learner.packing.piece import Piece
from treepo_async.types import (
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)

VOCABULARY, DEPTH, LAG, STEP_SIZE, NUM_DRAWS = 3, 3, 8, 2.5, 9
RESPONSES = tuple(itertools.product(range(VOCABULARY), repeat=DEPTH))
PREFIXES = tuple(
    y for n in range(1, DEPTH + 1) for y in itertools.product(range(VOCABULARY), repeat=n)
)
"""The segments of the tree, one token each."""
VERSION = PolicyVersion(0, LAG)
PROBLEMS = ("apart", "joint")

PLAIN = LossSettings(loss="reinforce", correction="none")
BEHAVIOR = LossSettings(anchor="behavior", correction="none")
VARIANTS = {
    "no correction": PLAIN,
    "`truncated`, cap 1.2": replace(PLAIN, correction="truncated", correction_cap=1.2),
    "`truncated`, cap 2": replace(PLAIN, correction="truncated"),
    "`truncated`, cap 5": replace(PLAIN, correction="truncated", correction_cap=5.0),
    "`icepop`, 0.5 to 2": replace(PLAIN, correction="icepop"),
    "`importance`": replace(PLAIN, correction="importance"),
    "decoupled PPO": LossSettings(proximal="recomputed", correction="importance"),
    "A-3PO": LossSettings(proximal="interpolated", correction="importance"),
    "`ppo` around behavior": BEHAVIOR,
    "`cispo` around behavior, 0 to 5": replace(BEHAVIOR, loss="cispo", clip_low=1.0, clip_high=4.0),
    "`dppo`": replace(BEHAVIOR, loss="dppo"),
    "`gspo` around behavior": replace(BEHAVIOR, loss="gspo"),
}
SIZE = "bias without correction / gradient on-policy"


@dataclass
class Problem:
    """A policy that moved, and the responses' rewards."""

    contexts: torch.Tensor
    """int64 [27, 3], row of the table for each token of each response."""
    rewards: torch.Tensor
    """[27]"""
    tables: list[torch.Tensor]
    """[contexts, 3] logits after 0, 1, ... 8 updates."""

    @classmethod
    def draw(cls, name, seed):
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape):
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        places = [list(range(DEPTH)) for _ in RESPONSES]
        prefixes = [[((), *PREFIXES).index(y[:t]) for t in range(DEPTH)] for y in RESPONSES]
        contexts = torch.tensor(places if name == "apart" else prefixes)
        of_places = uniform(DEPTH, VOCABULARY)
        sums = of_places[torch.arange(DEPTH), torch.tensor(RESPONSES)].mean(dim=1)
        rewards = sums if name == "apart" else uniform(len(RESPONSES))
        num_contexts = int(contexts.max()) + 1
        logits = torch.randn(num_contexts, VOCABULARY, generator=generator, dtype=torch.float64) / 2
        problem = cls(contexts, rewards, [logits])
        for _ in range(LAG):
            table = problem.tables[-1].clone().requires_grad_()
            value = (problem.logprobs(table).sum(1).exp() * rewards).sum()
            (gradient,) = torch.autograd.grad(value, table)
            problem.tables.append(problem.tables[-1] + STEP_SIZE * gradient)
        return problem

    def logprobs(self, table):
        """Of each token of each response, [27, 3]."""
        return table.log_softmax(-1)[self.contexts, torch.tensor(RESPONSES)]

    def probabilities(self, num_updates):
        """Of the responses, [27]."""
        return self.logprobs(self.tables[num_updates]).sum(1).exp()

    def biases(self):
        """By variant, the distance of the expected gradient to that on-policy in units of that without correction."""
        sampled, current = (self.probabilities(n) for n in (0, LAG))
        exact = self.gradient(PLAIN, current)

        def bias(settings):
            return (self.gradient(settings, sampled) - exact).norm().item()

        unit = bias(PLAIN)
        found = {variant: bias(settings) / unit for variant, settings in VARIANTS.items()}
        return found | {SIZE: unit / exact.norm().item()}

    def gradient(self, settings, weights):
        """Expected gradient of the objective where each response counts its weight, [contexts, 3]."""
        behavior, before = (self.by_segment(self.logprobs(self.tables[i])) for i in (0, LAG - 1))
        advantages = self.rewards - (self.probabilities(0) * self.rewards).sum()
        tree = tree_of(behavior)
        piece = Piece(0, tuple(range(len(RESPONSES))))
        (batch,) = pack([tree], [advantages.numpy()], [weights.numpy()], [[piece]])
        proximal = [before] if settings.proximal == "recomputed" else None
        edges = Edges.of(
            batch,
            torch.device("cpu"),
            version=VERSION,
            proximal=proximal,
            dtype=torch.float64,
        )
        table = self.tables[LAG].clone().requires_grad_()
        theta = self.by_segment(self.logprobs(table))
        theta = torch.cat([theta[segment] for _, segment, _ in batch.segments()])
        loss, *_ = Objective(settings)(edges, theta, torch.zeros_like(theta), Bounds())
        (gradient,) = torch.autograd.grad(loss, table)
        return -gradient

    @staticmethod
    def by_segment(values):
        """[27, 3] of responses to one number for each segment, [1] each."""
        first = [next(i for i, y in enumerate(RESPONSES) if y[: len(p)] == p) for p in PREFIXES]
        found = [values[i, len(p) - 1].reshape(1) for i, p in zip(first, PREFIXES, strict=True)]
        return found if values.requires_grad else [v.numpy().astype(np.float32) for v in found]


def tree_of(behavior):
    """All responses as one tree."""
    segments = [
        Segment(
            parent=PREFIXES.index(prefix[:-1]) if len(prefix) > 1 else -1,
            level=len(prefix) - 1,
            token_ids=np.array(prefix[-1:], np.int32),
            behavior_logprobs=behavior[i],
            policy_version=PolicyVersion(0, 0),
            stop=StopReason.LENGTH if len(prefix) == DEPTH else None,
        )
        for i, prefix in enumerate(PREFIXES)
    ]
    rewards = np.zeros(len(RESPONSES), np.float32)
    tree = Tree(
        prompt=Prompt(id="all", token_ids=np.zeros(1, np.int32), text="", answer=""),
        segments=tuple(segments),
        rewards_L=rewards,
        accuracies_L=rewards,
        sampling=Sampling(1.0, 1, DEPTH, len(RESPONSES), VOCABULARY),
        provenance=Provenance(lease_id="all", actor="none"),
    )
    tree.check()
    return tree


def ratios(name):
    """Medians over the draws of a problem, by variant."""
    draws = [Problem.draw(name, seed).biases() for seed in range(NUM_DRAWS)]
    return {variant: statistics.median(draw[variant] for draw in draws) for variant in draws[0]}


def rows():
    """Lines of the table."""
    columns = [ratios(name) for name in PROBLEMS]
    return [
        f"| {variant} | {' | '.join(f'{column[variant]:.2f}' for column in columns)} |"
        for variant in columns[0]
    ]


if __name__ == "__main__":
    print("\n".join(rows()))  # noqa: T201
