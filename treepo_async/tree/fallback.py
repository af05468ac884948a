"""Where a tree whose paths have all ended is forked again (TreePO, section 2.2). Pure.

Only paths that ended by EOS or box are forked again; the prompt is, where there is none. A fork hangs on a segment
that ends on the grid, so the path's last level is always sampled anew.
"""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from treepo_async.types import ROOT, Segment, StopReason, path_of

ANSWERED = (StopReason.EOS, StopReason.BOXED)


def candidates(
    segments: Sequence[Segment], finished: Sequence[int], rng: random.Random
) -> list[int]:
    """Leaves that may be forked again, in random order; the prompt if there are none."""
    answered = [leaf for leaf in finished if segments[leaf].stop in ANSWERED]
    rng.shuffle(answered)
    return answered or [ROOT]


def boundary(rule: str, segments: Sequence[Segment], leaf: int, rng: random.Random) -> int:
    """The segment to fork behind, or `ROOT`.

    Args:
        rule: random (any boundary of the path), low_confidence (before a level, the more likely the lower its mean
            log-prob is) or from_start (the prompt).
        segments: of the tree.
        leaf: the path's last segment, or `ROOT`.
        rng: draws.
    """
    return ROOT if leaf == ROOT else _RULES[rule](segments, leaf, rng)


def _random(segments: Sequence[Segment], leaf: int, rng: random.Random) -> int:
    return _behind_level(segments, leaf, rng.randint(0, segments[leaf].level))


def _low_confidence(segments: Sequence[Segment], leaf: int, rng: random.Random) -> int:
    levels: dict[int, list[float]] = {}
    for i in path_of(segments, leaf):
        levels.setdefault(segments[i].level, []).extend(segments[i].behavior_logprobs.tolist())
    means = [float(np.mean(logprobs)) for logprobs in levels.values()]
    weights = [math.exp(min(means) - mean) for mean in means]
    (level,) = rng.choices(list(levels), weights)
    return _behind_level(segments, leaf, level)


def _from_start(_segments: Sequence[Segment], _leaf: int, _rng: random.Random) -> int:
    return ROOT


def _behind_level(segments: Sequence[Segment], leaf: int, level: int) -> int:
    """The path's last segment above `level`."""
    above = [i for i in path_of(segments, leaf) if segments[i].level < level]
    return above[-1] if above else ROOT


_RULES: dict[str, Callable[[Sequence[Segment], int, random.Random], int]] = {
    "random": _random,
    "low_confidence": _low_confidence,
    "from_start": _from_start,
}
