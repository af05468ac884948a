"""How the forks of a round are dealt to the paths that survived it (TreePO, sections 2.2 and 4.4). Pure.

Invariant: every path gets at least one, and all of the budget is dealt.
"""

import math
import random
from collections.abc import Sequence

SIGNS = {"logprob_high": 1.0, "logprob_low": -1.0, "entropy": 1.0}
"""Of the score in the softmax, by the name of the rule; `even` needs none."""


def split_evenly(budget: int, num_paths: int, rng: random.Random) -> list[int]:
    """Equal shares, the remainder spread at random."""
    share, remainder = divmod(budget, num_paths)
    lucky = set(rng.sample(range(num_paths), remainder))
    return [share + (i in lucky) for i in range(num_paths)]


def split_by_score(
    budget: int, scores: Sequence[float], rule: str, temperature: float, rng: random.Random
) -> list[int]:
    """One fork each, the rest in proportion to `softmax(sign * score / temperature)` by largest remainder.

    Equal remainders are ordered at random.

    Args:
        budget: at least the number of paths.
        scores: one a path: a mean log-prob or an entropy, in nats.
        rule: key of `SIGNS`.
        temperature: of the softmax.
        rng: breaks ties.
    """
    rest = budget - len(scores)
    exponents = [SIGNS[rule] * score / temperature for score in scores]
    weights = [math.exp(x - max(exponents)) for x in exponents]
    exact = [rest * weight / sum(weights) for weight in weights]
    shares = [math.floor(x) for x in exact]
    order = sorted(
        range(len(scores)), key=lambda i: (exact[i] - shares[i], rng.random()), reverse=True
    )
    for i in order[: rest - sum(shares)]:
        shares[i] += 1
    return [1 + share for share in shares]


def temperature_at(start: float, end: float | None, progress: float) -> float:
    """Along half a cosine from `start` to `end`.

    Args:
        start: at progress 0.
        end: at progress 1; None: always `start`.
        progress: share of the training steps that are done.
    """
    if end is None:
        return start
    part = min(1.0, max(0.0, progress))
    return (start + end) / 2 + (start - end) / 2 * math.cos(math.pi * part)
