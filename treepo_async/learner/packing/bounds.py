"""What some masks must know about the whole batch before any microbatch of it is computed.

Made on rank 0 from the proximal log-probs of all trees and told to every rank, so that a mask does not depend on how the batch is
divided. Neighbours: `mask` reads them, `share` carries them, `batch` has them made. Pure numpy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from treepo_async.learner.packing.geometry import Float64
from treepo_async.learner.packing.piece import counted_leaves
from treepo_async.types import Float32, PolicyVersion, Segment, Tree


@dataclass(frozen=True, slots=True)
class Bounds:
    """Numbers of a batch; the defaults mask nothing."""

    log_ratio_std: float = math.nan
    """Standard deviation of proximal - behavior log-probs over trained tokens that are not fresh, in nats; NaN without any."""
    largest_square: float = math.inf
    """Tokens whose squared log-ratio is above it are masked by `m2po`."""


def bounds_of(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    proximal: Sequence[Sequence[Float32]],
    version: PolicyVersion,
    *,
    mean_square: float,
    correct_fresh: bool,
) -> Bounds:
    """The bounds of a batch; a token counts once per trained trajectory through it.

    Args:
        trees: the batch.
        advantages: per tree [L] or [L, D]; a NaN leaves a trajectory out.
        proximal: per tree and segment [T], log-probs under the weights at the start of the batch.
        version: of those weights.
        mean_square: what the mean of the squared log-ratios that are kept is at most, in nats squared; fresh tokens count in it,
            with squares of 0 unless `correct_fresh`.
        correct_fresh: whether fresh tokens have a log-ratio other than 0.
    """
    ratios: list[Float64] = [np.empty(0)]
    counts: list[Float64] = [np.empty(0)]
    stale: list[NDArray[np.bool_]] = [np.empty(0, np.bool_)]
    for tree, values, of_tree in zip(trees, advantages, proximal, strict=True):
        found = log_ratios(tree, of_tree, version, correct_fresh=correct_fresh)
        for i, count in enumerate(_num_trained(tree, values)):
            if count > 0:
                length, fresh = len(found[i]), is_fresh(tree.segments[i], version)
                ratios.append(found[i])
                counts.append(np.full(length, float(count)))
                stale.append(np.full(length, not fresh))
    ratio, count = np.concatenate(ratios), np.concatenate(counts)
    is_stale = np.concatenate(stale)
    return Bounds(
        log_ratio_std=_std(ratio[is_stale], count[is_stale]),
        largest_square=_largest_square(ratio**2, count, mean_square),
    )


def log_ratios(
    tree: Tree, proximal: Sequence[Float32], version: PolicyVersion, *, correct_fresh: bool
) -> list[Float64]:
    """Proximal - behavior log-probs of each segment's tokens, [T] each; 0 for fresh ones unless `correct_fresh`."""
    return [
        np.zeros(len(segment))
        if is_fresh(segment, version) and not correct_fresh
        else values.astype(np.float64) - segment.behavior_logprobs
        for segment, values in zip(tree.segments, proximal, strict=True)
    ]


def is_fresh(segment: Segment, version: PolicyVersion) -> bool:
    """Whether sampled under the version, with a KV cache of that version alone."""
    return segment.policy_version == version and not segment.mixed_context


def _num_trained(tree: Tree, advantages: Float64) -> NDArray[np.int64]:
    """Trained trajectories through each segment, [segments]."""
    paths = [tree.path(tree.leaves[leaf]) for leaf in counted_leaves(advantages)]
    flat = np.array([i for path in paths for i in path], np.int64)
    return np.bincount(flat, minlength=len(tree.segments))


def _std(values: Float64, weights: Float64) -> float:
    total = weights.sum()
    if total == 0:
        return math.nan
    mean = (weights * values).sum() / total
    return math.sqrt((weights * (values - mean) ** 2).sum() / total)


def _largest_square(squares: Float64, weights: Float64, mean_square: float) -> float:
    """A bound between the largest square that is kept and the smallest that is not, infinite where all are kept.

    Equal squares are kept or left out together. Half-way, so that rounding on a device puts no token on the other side.
    """
    distinct, place = np.unique(squares, return_inverse=True)
    weight = np.bincount(place, weights, minlength=len(distinct))
    means = np.cumsum(distinct * weight) / np.cumsum(weight)
    num_kept = int(np.searchsorted(means, mean_square, side="right"))
    if num_kept == len(distinct):
        return math.inf
    kept = distinct[num_kept - 1] if num_kept else 0.0
    return float(kept + distinct[num_kept]) / 2
