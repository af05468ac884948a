"""From accuracies to the rewards that are trained on; pure. Axis letter: `L` leaves.

The overlong penalty is the soft overlong punishment of DAPO (arXiv 2503.14476), which TreePO trains with.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from treepo_async.config.schema import RewardConfig
from treepo_async.types import Float32


@dataclass(frozen=True, slots=True)
class RewardRules:
    """How an accuracy becomes a reward."""

    correct: float
    """Reward of accuracy 1."""
    wrong: float
    """Reward of accuracy 0."""
    max_response_tokens: int
    """The response limit."""
    overlong_tokens: int = 0
    """Length of the zone before the limit in which the penalty grows; 0: no penalty."""
    overlong_penalty: float = 0.0
    """At the limit."""

    @classmethod
    def of(cls, reward: RewardConfig, max_response_tokens: int) -> Self:
        """The rules of a run whose responses have at most so many tokens."""
        return cls(
            reward.correct,
            reward.wrong,
            max_response_tokens,
            reward.overlong_tokens,
            reward.overlong_penalty,
        )


def rewards(accuracies_L: Float32, num_tokens_L: NDArray[np.int64], rules: RewardRules) -> Float32:
    """Linear from `wrong` at accuracy 0 to `correct` at accuracy 1, less the overlong penalty.

    Args:
        accuracies_L: [L], NaN where there is none; so is the reward then.
        num_tokens_L: [L], response tokens.
        rules: the numbers.

    Returns:
        [L].
    """
    accuracies: NDArray[np.float64] = accuracies_L.astype(np.float64)
    linear_L = accuracies * rules.correct + (1 - accuracies) * rules.wrong
    return (linear_L + overlong(num_tokens_L, rules)).astype(np.float32)


def overlong(num_tokens_L: NDArray[np.int64], rules: RewardRules) -> NDArray[np.float64]:
    """`min(0, -(length - (limit - zone)) / zone * penalty)`, [L]: 0 up to the zone, `-penalty` at the limit."""
    if rules.overlong_tokens == 0:
        return np.zeros(len(num_tokens_L))
    into_zone_L = num_tokens_L - (rules.max_response_tokens - rules.overlong_tokens)
    penalty_L = -into_zone_L / rules.overlong_tokens * rules.overlong_penalty
    return np.minimum(0.0, penalty_L).astype(np.float64)
