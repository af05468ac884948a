"""Advantages of a batch to mean 0 and variance 1 (REINFORCE++, 2501.03262)."""

from collections.abc import Sequence

import numpy as np

from treepo_async.tree.levels import Float64, Int64


def whiten(
    advantages: Sequence[Float64], num_tokens: Sequence[Int64] | Sequence[Float64]
) -> list[Float64]:
    """Advantages of a batch of trees to mean 0 and variance 1 over its trajectory tokens.

    Each value counts with its tokens, so that a token shared by k trajectories counts k times; the variance has the
    N - 1 of REINFORCE++ and 1e-8 is added to it. NaN stays NaN and does not count. A batch of fewer than two tokens has
    no variance and is given back as it is.

    Args:
        advantages: per tree, [L] or [L, D].
        num_tokens: per tree and of the same shape, the response tokens that have each value: of each trajectory, or of
            each of its levels (`levels.level_tokens`). They may be weighted and then need not be whole.
    """
    if len(advantages) == 0:
        return []
    values = np.concatenate([np.ravel(a) for a in advantages])
    weights = np.concatenate([np.ravel(n) for n in num_tokens]).astype(np.float64)
    counted = np.isfinite(values)
    total = weights[counted].sum()
    if total < 2:
        return [np.asarray(a, dtype=np.float64) for a in advantages]
    mean = (weights * values)[counted].sum() / total
    variance = (weights * (values - mean) ** 2)[counted].sum() / (total - 1)
    return [(np.asarray(a) - mean) / np.sqrt(variance + 1e-8) for a in advantages]
