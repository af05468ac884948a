"""Mean length of trajectories, as a tree delivers them and as independent samples would have it.

A tree's trajectories are no sample of the policy: those that go on inherit the forks of those that ended, so that their
mean length is too large. Weighted by their probability under the tree's forks they are one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LengthSums:
    """Over the whole trajectories of any number of trees."""

    tokens: int = 0
    trajectories: int = 0
    weighted_tokens: float = 0.0
    """Tokens of each trajectory times its unbiased weight."""
    weights: float = 0.0

    def __add__(self, other: "LengthSums") -> "LengthSums":
        return LengthSums(
            self.tokens + other.tokens,
            self.trajectories + other.trajectories,
            self.weighted_tokens + other.weighted_tokens,
            self.weights + other.weights,
        )

    @property
    def delivered(self) -> float | None:
        """Mean tokens of a trajectory; None without any."""
        return self.tokens / self.trajectories if self.trajectories else None

    @property
    def unbiased(self) -> float | None:
        """The estimate of the same for independent samples; None without any."""
        return self.weighted_tokens / self.weights if self.weights else None
