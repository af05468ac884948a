"""Forests as the `end` of each token: of any shape, and of a tree that forks at given levels. Pure numpy."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


def random_end(
    rng: np.random.Generator, num_tokens: int, *, longest: int = 16, lone_share: float = 0.15
) -> Int32:
    """A random forest, int32 [T]: trees of any shape, and among them tokens that see themselves only.

    Args:
        rng: the only source of randomness.
        num_tokens: T.
        longest: of a segment; lengths are spread evenly over their logarithms.
        lone_share: how often a root is a few lone tokens.
    """
    end = np.zeros(num_tokens, np.int32)
    pending = [(0, num_tokens, True)]
    while pending:
        start, stop, is_root = pending.pop()
        if start == stop:
            continue
        if is_root and rng.random() < lone_share:
            close = min(stop, start + int(rng.integers(1, 6)))
            end[start:close] = np.arange(start, close) + 1
        else:
            close = start + int(rng.integers(1, stop - start + 1))
            length = int(np.exp(rng.uniform(0.0, np.log(longest + 1))))
            middle = min(close, start + length)
            end[start:middle] = close
            pending.append((middle, close, False))
        pending.append((close, stop, is_root))
    return end


def regular_end(*, prompt: int, segment: int, depth: int, forks: Collection[int]) -> Int32:
    """A tree whose paths all fork into two at the levels `forks`, int32 [T].

    Args:
        prompt: tokens.
        segment: tokens of each level.
        depth: levels.
        forks: levels, from 0, that begin with a fork.
    """

    def below(level: int) -> Int32:
        if level == depth:
            return np.zeros(0, np.int32)
        rest = below(level + 1)
        path = np.concatenate([np.full(segment, segment + len(rest), np.int32), rest + segment])
        return np.concatenate([path, path + len(path)]) if level in forks else path

    rest = below(0)
    return np.concatenate([np.full(prompt, prompt + len(rest)), rest + prompt]).astype(np.int32)
