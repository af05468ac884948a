"""What replay must know of a tree, from its frames alone: no `Segment` is built, however many there are.

Axis letters: `T` tokens, `S` segments, `L` leaves, `N` nodes: 0 is the prompt, 1 + i is segment i. Sums and products over paths are
taken by doubling: after k rounds a node knows its 2^k nearest ancestors, so that the rounds grow with the logarithm
of the depth, whoever made the tree.

Invariant: accepted is exactly what `codec.decode_tree` accepts, and the facts are those of the tree that it gives
(`weight_sum` and `weighted_tokens` up to rounding).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import WireError
from treepo_async.types import (
    LEAST_CHANCE,
    LOGPROB_SLACK,
    ROOT,
    PolicyVersion,
    Provenance,
    Sampling,
    StopReason,
)
from treepo_async.wire.columns import STOPS, Columns, read_frames

_OPEN, _ABORT, _PRUNED = map(STOPS.index, (None, StopReason.ABORT, StopReason.PRUNED))
_MANY = 2**31
"""More than a tree has of anything: larger settings are as good as this one."""

Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TreeFacts:
    """A tree in numbers."""

    prompt_id: str
    provenance: Provenance
    versions: tuple[PolicyVersion, ...]
    """All that sampled a segment, each once, ascending."""
    oldest: PolicyVersion
    """Of the lowest step among the segments of whole trajectories, of all segments where none is whole; the least lineage of
    those."""
    num_leaves: int
    """Trajectories, pruned paths left out."""
    num_scored: int
    accuracy_sum: float
    has_spread: bool
    """As `tree.advantage.has_spread`."""
    is_scored: bool
    """Whether any leaf has a reward."""
    num_tokens: int
    """Sampled, each counted once."""
    delivered_tokens: int
    """Counted once for each trajectory they belong to."""
    weight_sum: float
    """Of the trajectories' unbiased weights; see `tree.path_weights`."""
    weighted_tokens: float
    """Tokens of the trajectories times these weights, summed."""

    @property
    def lease_id(self) -> str:
        """For which the tree says it was grown."""
        return self.provenance.lease_id

    @property
    def actor(self) -> str:
        """Who the tree says grew it."""
        return self.provenance.actor


def facts_of(frames: Sequence[bytes], *, vocab_size: int | None = None) -> TreeFacts:
    """The facts of the tree in `frames`.

    Args:
        frames: what `codec.encode_tree` gave.
        vocab_size: refuse token ids outside of it.

    Raises:
        WireError: naming the frame or field that is wrong, wherever `codec.decode_tree` raises it.
    """
    header, columns = read_frames(frames, vocab_size=vocab_size)
    _check_sampling(header.sampling)
    _check_tokens(columns)
    paths = _Paths.of(columns, header.sampling)
    accuracies_L = columns["accuracies_L"]
    known = accuracies_L[np.isfinite(accuracies_L)]
    num_leaves = len(paths.tokens_L)
    return TreeFacts(
        prompt_id=header.prompt_id,
        provenance=header.provenance,
        versions=_versions(columns),
        oldest=_oldest(columns, paths.is_whole_S),
        num_leaves=num_leaves,
        num_scored=len(known),
        accuracy_sum=float(known.sum()),
        has_spread=len(known) > 0 and (num_leaves == 1 or bool(known.max() > known.min())),
        is_scored=bool(np.isfinite(columns["rewards_L"]).any()),
        num_tokens=len(columns["token_ids_T"]),
        delivered_tokens=int(paths.tokens_L.sum()),
        weight_sum=float(paths.weights_L.sum()),
        weighted_tokens=float(paths.weights_L @ paths.tokens_L),
    )


@dataclass(frozen=True, slots=True)
class _Paths:
    """The trajectories of a tree; here `L` leaves pruned paths out."""

    tokens_L: Int64
    weights_L: Float64
    """See `tree.path_weights`, unbiased."""
    is_whole_S: Bool
    """Whether a trajectory passes; true everywhere where there is none."""

    @classmethod
    def of(cls, columns: Columns, sampling: Sampling) -> Self:
        """Check how the segments hang together, and follow the paths."""
        parent_N = _parents(columns["parent_S"])
        is_leaf_S = np.bincount(parent_N[1:], minlength=len(parent_N))[1:] == 0
        _check_stops(columns["stop_S"], is_leaf_S)
        _check_inclusions(columns["inclusion_S"])
        is_end_S = is_leaf_S & (columns["stop_S"] != _PRUNED)
        tokens_N = _with_prompt(0, columns["length_S"], np.int64)
        chance_N = _with_prompt(1, _chances(columns, parent_N, is_leaf_S), np.float64)
        included_N = _with_prompt(1, columns["inclusion_S"], np.float64)
        is_whole_N = _with_prompt(0, is_end_S, np.bool_)
        ancestor_N = parent_N
        while np.count_nonzero(ancestor_N):
            tokens_N = tokens_N + tokens_N[ancestor_N]
            chance_N = chance_N * chance_N[ancestor_N]
            included_N = included_N * included_N[ancestor_N]
            is_whole_N[ancestor_N[is_whole_N]] = True
            ancestor_N = ancestor_N[ancestor_N]
        _refuse(
            included_N[1:] < LEAST_CHANCE,
            "inclusion",
            columns["inclusion_S"],
            f"the product over its path is below {LEAST_CHANCE}",
        )
        _check_levels(columns, tokens_N[1:], sampling)
        _check_scores(columns, int(is_leaf_S.sum()))
        has_whole = np.count_nonzero(is_end_S) > 0
        return cls(
            tokens_N[1:][is_end_S],
            1 / chance_N[1:][is_end_S],
            is_whole_N[1:] if has_whole else np.ones(len(is_end_S), np.bool_),
        )


def _chances(columns: Columns, parent_N: Int64, is_leaf_S: Bool) -> Float64:
    """What each segment contributes to 1 / weight of a path: `inclusion`, times the number of forks where a level ends.

    As in `tree.levels`, forks are counted between grid levels, and segments cut inside a level make none: `above` is the
    node at the end of the level before.
    """
    level_N = _with_prompt(-1, columns["level_S"], np.int64)
    goes_on_N = level_N == level_N[parent_N]
    goes_on_N[0] = False
    above_N = parent_N
    if np.count_nonzero(goes_on_N):
        above_N = parent_N[_first_in_level(parent_N, goes_on_N)]
    ends_level_N = _with_prompt(0, is_leaf_S, np.bool_)
    ends_level_N[parent_N[~goes_on_N]] = True
    ends_level_N[0] = False
    num_children_N = np.bincount(above_N[ends_level_N], minlength=len(parent_N))
    forks_N = np.where(ends_level_N, num_children_N[above_N], 1)
    chances_S: Float64 = columns["inclusion_S"] * forks_N[1:]
    return chances_S


def _first_in_level(parent_N: Int64, goes_on_N: Bool) -> Int64:
    """The node with which the part of the path that ends here entered the level, [N]."""
    first_N = np.where(goes_on_N, parent_N, np.arange(len(parent_N)))
    while not np.array_equal(further_N := first_N[first_N], first_N):
        first_N = further_N
    return first_N


def _parents(parent_S: NDArray[Any]) -> Int64:
    """The node before each, [N]; the prompt's is itself."""
    if len(parent_S) == 0:
        raise WireError("segments is empty: a tree needs at least one segment")
    parent_N = _with_prompt(0, parent_S, np.int64)
    parent_N[1:] -= ROOT
    is_bad = (parent_N[1:] < 0) | (parent_N[1:] > np.arange(len(parent_S)))
    _refuse(is_bad, "parent", parent_S, "it must be -1 or the index of an earlier segment")
    return parent_N


def _with_prompt(value: int, values_S: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """[N] from [S]."""
    values_N = np.empty(1 + len(values_S), dtype)
    values_N[0] = value
    values_N[1:] = values_S
    return values_N


def _versions(columns: Columns) -> tuple[PolicyVersion, ...]:
    keys = (columns["lineage_S"].astype(np.int64) << 32) | columns["step_S"]
    return tuple(PolicyVersion(key >> 32, key & (_MANY - 1)) for key in sorted({*keys.tolist()}))


def _oldest(columns: Columns, is_whole_S: Bool) -> PolicyVersion:
    keys = (columns["step_S"].astype(np.int64) << 32) | columns["lineage_S"]
    key = int(keys[is_whole_S].min())
    return PolicyVersion(key & (_MANY - 1), key >> 32)


# ---------------------------------------------------------------- checks, as of `types.Tree.check`


def _check_sampling(sampling: Sampling) -> None:
    for name in ("segment_tokens", "max_depth", "width", "branching_factor"):
        if getattr(sampling, name) < 1:
            raise WireError(f"sampling.{name} is {getattr(sampling, name)}, it must be at least 1")
    if not 0 < sampling.temperature < math.inf:
        raise WireError(
            f"sampling.temperature is {sampling.temperature}, it must be above 0 and finite"
        )


def _check_tokens(columns: Columns) -> None:
    if len(columns["prompt_ids_P"]) == 0:
        raise WireError("prompt.token_ids is empty: a tree needs at least one prompt token")
    logprobs = columns["behavior_logprobs_T"]
    # a NaN is the largest and the least of all, and no comparison with it holds
    if len(logprobs) and not (logprobs.max() <= LOGPROB_SLACK and logprobs.min() > -np.inf):
        raise WireError("behavior_logprobs_T are not finite log-probs")


def _check_stops(stop_S: NDArray[Any], is_leaf_S: Bool) -> None:
    _refuse(is_leaf_S == (stop_S == _OPEN), "stop", stop_S, "a leaf has one, and nothing else")
    _refuse(stop_S == _ABORT, "stop", stop_S, "that is abort: an aborted run belongs to no tree")


def _check_inclusions(inclusion_S: NDArray[Any]) -> None:
    is_good = (inclusion_S > 0) & (inclusion_S <= 1)
    _refuse(~is_good, "inclusion", inclusion_S, "it must be above 0 and at most 1")


def _check_levels(columns: Columns, end_S: Int64, sampling: Sampling) -> None:
    grid, depth = min(sampling.segment_tokens, _MANY), min(sampling.max_depth, _MANY)
    level_S = columns["level_S"]
    first_S, last_S = (end_S - columns["length_S"]) // grid, (end_S - 1) // grid
    is_bad = (first_S != level_S) | (last_S != level_S)
    _refuse(is_bad, "level", level_S, f"its tokens lie elsewhere on a grid of {grid}")
    _refuse(level_S >= depth, "level", level_S, f"it must be below sampling.max_depth={depth}")


def _check_scores(columns: Columns, num_leaves: int) -> None:
    for name in ("rewards_L", "accuracies_L"):
        values_L = columns[name]
        if len(values_L) != num_leaves:
            raise WireError(f"{name} has {len(values_L)} values, the tree has {num_leaves} leaves")
        if np.count_nonzero(np.isinf(values_L)):
            raise WireError(f"{name} has an infinite value; a failed score is NaN")


def _refuse(is_bad_S: Bool, field: str, values_S: NDArray[Any], rule: str) -> None:
    """Raise for the first segment that is bad."""
    if np.count_nonzero(is_bad_S):
        i = int(is_bad_S.argmax())
        raise WireError(f"segments[{i}].{field} is {values_S[i].item()}: {rule}")
