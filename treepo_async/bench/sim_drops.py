"""The share of trees that are dropped for want of spread, as a curve over the policy's steps.

    counts of a real run, step by step -> fit -> Drops -> at(x), in `sim_world` for every tree that is begun

While few responses are right most trees have none, and when most are right many trees have nothing else: the share falls and
rises again. It belongs to what was learned and not to the rules of a run, so it is the same for every staleness. Larger batches
learn more in a step: a step of B prompts is worth (B / B0) ** `GAMMA` steps of B0, the batch of the run that was fitted.

The logit of the share is a quadratic of x, fitted by binomial maximum likelihood. Behind the last step that was seen it goes on
as a line with half the last slope, and no share is above `MOST`. Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

GAMMA = 0.4
"""Of runs with 16 steps of 8 and of 16 prompts that nothing is predicted for; docs/simulation.md tells of them."""
MOST = 0.9
"""Of the trees: a run that drops nearly all of them has no end."""
RIDGE = 1e-3
BEYOND = 0.5
"""Of the last slope."""
_TURNS = 100
_MOST_TURN = 2.0
"""In logits: from a far start whole Newton steps go astray."""

Counts = Sequence[tuple[int, int, int, float]]
"""Step from 1, trees dropped for want of spread in it, trees accepted in it, by how many steps the policy was behind that grew them."""


@dataclass(frozen=True, slots=True)
class Drops:
    """A fitted curve."""

    prompts_per_batch: int
    """B0."""
    middle: float
    scale: float
    logits: tuple[float, float, float]
    """Of z ** 0, z and z ** 2, with z = (x - middle) / scale."""
    last: float
    """The number of the last step that was seen: behind it is the line."""

    def place(self, step: float, prompts_per_batch: int) -> float:
        """The x of a step of batches of another size."""
        return float(step * (prompts_per_batch / self.prompts_per_batch) ** GAMMA)

    def at(self, x: float) -> float:
        """The share."""
        inside = min(x, self.last)
        a, b, c = self.logits
        z = (inside - self.middle) / self.scale
        slope = (b + 2 * c * z) / self.scale
        logit = a + b * z + c * z * z + BEYOND * slope * (x - inside)
        # the cap keeps the exponential in its range on one side, the ridge of the fit on the other
        return min(MOST, 1 / (1 + math.exp(min(-logit, 500.0))))


def fit(counts: Counts, prompts_per_batch: int) -> Drops:
    """The curve that makes the counts most likely.

    A record counts the trees that arrived in its step. They stand at the middle of the step under whose policy they were grown,
    as that is where a simulated tree looks the share up.

    Args:
        counts: of every step of a run, with at least one tree.
        prompts_per_batch: of that run.
    """
    steps, dropped, accepted, staleness = np.array(counts, dtype=np.float64).T
    last = float(steps.max())
    z = (np.maximum(steps - 0.5 - staleness, 0) - last / 2) / (last / 2)
    powers = np.stack([np.ones_like(z), z, z * z], axis=1)
    a, b, c = _most_likely(powers, dropped, dropped + accepted)
    return Drops(prompts_per_batch, last / 2, last / 2, (a, b, c), last)


def _most_likely(powers: Any, dropped: Any, trees: Any) -> tuple[float, float, float]:
    """Newton's method on the log-likelihood less `RIDGE` / 2 times the squares of the three."""
    found = np.zeros(3)
    for _ in range(_TURNS):
        share = 1 / (1 + np.exp(-powers @ found))
        slope = powers.T @ (dropped - trees * share) - RIDGE * found
        weight = trees * share * (1 - share)
        bend = powers.T @ (powers * weight[:, None]) + RIDGE * np.eye(3)
        turn = np.linalg.solve(bend, slope)
        found = found + turn * min(1.0, _MOST_TURN / max(float(np.abs(turn).max()), 1e-12))
        if float(np.abs(turn).max()) < 1e-9:
            break
    return float(found[0]), float(found[1]), float(found[2])
