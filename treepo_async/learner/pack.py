"""Trees to microbatches: every unique token once, in depth-first pre-order.

Axis letters: `L` leaves, `D` grid levels of a tree, `T` packed tokens, `E` trained tokens. Neighbours: `geometry` places the segments of a tree,
`attention` reads `end`, `loss` reads the three floats per trained token, `step` walks the microbatches. Pure numpy.

Invariant: `k` is on the path of `q` exactly when `k <= q < end[k]`; `geometry` says why.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import TreeError
from treepo_async.learner.geometry import Geometry, by_level
from treepo_async.types import Tree

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One microbatch: a forest on the `T` axis and its trained tokens on the `E` axis.

    A trained token is predicted from the logits at its predecessor on the path, which is not the packed token
    before it wherever a branch opens; hence `prev`, and labels that no shift of `input_ids` would give.
    """

    input_ids: Int64
    """[T]"""
    position_ids: Int64
    """[T], depth on the path counted from the prompt's first token: what RoPE must follow."""
    end: Int32
    """[T], query `q` sees key `k` exactly when `k <= q < end[k]`."""
    prev: Int64
    """[E], packed index of the predecessor of each trained token."""
    target: Int64
    """[E], packed index of each trained token; its label is `input_ids[target]`."""
    positive: Float32
    """[E], sum of max(A, 0) over the counted leaves below, A on the token's level."""
    negative: Float32
    """[E], sum of max(-A, 0) over the counted leaves below, A on the token's level."""
    count: Float32
    """[E], number of counted leaves below."""
    behavior_logprobs: Float32
    """[E]"""
    temperature: Float32
    """[E], the temperature the behavior log-probs were taken at."""
    policy_step: Int64
    """[E]"""
    lineage: Int64
    """[E]"""
    mixed_context: Bool
    """[E], whether part of the KV cache behind the token was computed under older weights."""
    level: Int32
    """[E], grid level of the token's segment."""
    tree_index: Int64
    """[E], index into the sequence of trees that was packed."""
    segment_index: Int64
    """[E], index into the segments of that tree."""

    @property
    def num_tokens(self) -> int:
        """Packed tokens, padding included: T."""
        return len(self.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Trained tokens, each counted once: E."""
        return len(self.target)

    @property
    def num_trajectory_tokens(self) -> int:
        """Trained tokens counted once per trajectory they belong to."""
        return int(self.count.sum(dtype=np.float64))

    def segments(self) -> Iterator[tuple[int, int, slice]]:
        """Yield (tree, segment, its slice of the E axis) for every trained segment."""
        moved = (np.diff(self.tree_index) != 0) | (np.diff(self.segment_index) != 0)
        bounds = [0, *(np.flatnonzero(moved) + 1).tolist(), self.num_trained_tokens]
        for start, stop in pairwise(bounds):
            if start < stop:
                yield (
                    int(self.tree_index[start]),
                    int(self.segment_index[start]),
                    slice(start, stop),
                )


PACKED_INDICES = ("end", "prev", "target")
"""Fields that hold packed indices and move with the place of a tree in its microbatch."""


def pack(
    trees: Sequence[Tree], advantages: Sequence[Float64], budget_tokens: int, align: int = 1
) -> list[PackedBatch]:
    """Lay trees out in microbatches of whole trees, in their order.

    Args:
        trees: any number; a leaf whose advantage is NaN contributes nothing, and tokens below no other leaf
            are context that is not trained.
        advantages: per tree one number per leaf, `[L]`, or one per leaf and level, `[L, D]`; what stands behind
            a leaf's own last level is not read.
        budget_tokens: most tokens of a microbatch; a single larger tree gets one of its own.
        align: every microbatch is padded to a multiple of this with roots that see only themselves.

    Raises:
        TreeError: the advantages of a tree have another shape, or a leaf has some that are NaN and some that are not.
    """
    groups = next_fit([num_packed_tokens(tree) for tree in trees], budget_tokens)
    return pack_groups(trees, advantages, groups, align)


def pack_groups(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    groups: Sequence[Sequence[int]],
    align: int = 1,
) -> list[PackedBatch]:
    """Lay trees out in microbatches that are given.

    Args:
        trees: as for `pack`.
        advantages: as for `pack`.
        groups: per microbatch, indices of its trees; one without any becomes an `empty_batch`.
        align: as for `pack`.

    Raises:
        TreeError: as for `pack`.
    """
    layouts = [
        _lay_out(tree, by_level(tree, values, i), i)
        for i, (tree, values) in enumerate(zip(trees, advantages, strict=True))
    ]
    return [
        _pad(_concatenate([layouts[i] for i in group]), align) if group else empty_batch(align)
        for group in groups
    ]


def pack_sequences(
    sequences: Sequence[Int32], budget_tokens: int, align: int = 1
) -> list[PackedBatch]:
    """Lay plain sequences out like trees of one path, every token after the first trained at temperature 1.

    `tree_index` counts the sequences; advantages are 0 and `count` is 1.

    Raises:
        TreeError: a sequence is empty.
    """
    layouts = [_lay_out_sequence(token_ids, i) for i, token_ids in enumerate(sequences)]
    groups = next_fit([layout.num_tokens for layout in layouts], budget_tokens)
    return [_pad(_concatenate([layouts[i] for i in group]), align) for group in groups]


def num_packed_tokens(tree: Tree) -> int:
    """Tokens that a tree takes on the `T` axis: its prompt, and every segment once."""
    return len(tree.prompt.token_ids) + sum(len(segment) for segment in tree.segments)


def next_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Group items in their order: one opens a new group when it no longer fits in the last.

    Returns:
        Indices into `sizes`, per group.
    """
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= size
    return groups


def empty_batch(align: int = 1) -> PackedBatch:
    """A microbatch of padding alone: no trained token, and a loss and gradient of exactly zero."""
    return _pad(_lay_out_sequence(np.zeros(1, np.int32), 0), align)


def edge_values(batch: PackedBatch, values: Sequence[Sequence[Float32]]) -> Float32:
    """Per-segment values of the packed trees, `values[tree][segment][token]`, gathered on the E axis.

    Raises:
        TreeError: a segment has not one value per token.
    """
    gathered = np.empty(batch.num_trained_tokens, np.float32)
    for tree, segment, edges in batch.segments():
        found = values[tree][segment]
        if len(found) != edges.stop - edges.start:
            raise TreeError(
                f"tree {tree} segment {segment} has {edges.stop - edges.start} tokens "
                f"and {len(found)} values; it needs one per token"
            )
        gathered[edges] = found
    return gathered


def _lay_out(tree: Tree, advantages_LD: Float64, tree_index: int) -> PackedBatch:
    """One tree as a microbatch of its own, without padding."""
    place, prompt_P = Geometry(tree), tree.prompt.token_ids
    ordered = [tree.segments[i] for i in place.order]
    sums_T3 = place.leaf_sums(tree.leaves, advantages_LD)
    kept = sums_T3[:, 2] > 0
    sums_E3 = sums_T3[kept].astype(np.float32)

    def trained(values: Iterable[Any], dtype: type) -> NDArray[Any]:
        return place.spread(np.array(list(values), dtype))[kept]

    return PackedBatch(
        input_ids=_join([prompt_P, *(s.token_ids for s in ordered)], np.int64),
        position_ids=_join([np.arange(len(prompt_P)), place.depth()], np.int64),
        end=_join([np.full(len(prompt_P), len(prompt_P) + len(kept)), place.end()], np.int32),
        prev=place.prev()[kept],
        target=place.index_T[kept],
        positive=sums_E3[:, 0],
        negative=sums_E3[:, 1],
        count=sums_E3[:, 2],
        behavior_logprobs=_join([s.behavior_logprobs for s in ordered], np.float32)[kept],
        temperature=np.full(len(sums_E3), tree.sampling.temperature, np.float32),
        policy_step=trained((s.policy_version.step for s in tree.segments), np.int64),
        lineage=trained((s.policy_version.lineage for s in tree.segments), np.int64),
        mixed_context=trained((s.mixed_context for s in tree.segments), np.bool_),
        level=trained((s.level for s in tree.segments), np.int32),
        tree_index=np.full(len(sums_E3), tree_index, np.int64),
        segment_index=trained(range(len(tree.segments)), np.int64),
    )


def _lay_out_sequence(token_ids: Int32, tree_index: int) -> PackedBatch:
    """One plain sequence as a microbatch of its own, without padding."""
    if len(token_ids) == 0:
        raise TreeError(f"sequences[{tree_index}] is empty; it needs at least one token")
    num_tokens, num_trained = len(token_ids), len(token_ids) - 1
    zeros = np.zeros(num_trained, np.int64)
    return PackedBatch(
        input_ids=token_ids.astype(np.int64),
        position_ids=np.arange(num_tokens),
        end=np.full(num_tokens, num_tokens, np.int32),
        prev=np.arange(num_trained),
        target=np.arange(1, num_tokens),
        positive=zeros.astype(np.float32),
        negative=zeros.astype(np.float32),
        count=np.ones(num_trained, np.float32),
        behavior_logprobs=zeros.astype(np.float32),
        temperature=np.ones(num_trained, np.float32),
        policy_step=zeros,
        lineage=zeros,
        mixed_context=zeros.astype(np.bool_),
        level=zeros.astype(np.int32),
        tree_index=np.full(num_trained, tree_index, np.int64),
        segment_index=zeros,
    )


def _concatenate(layouts: Sequence[PackedBatch]) -> PackedBatch:
    shifts = np.cumsum([0, *(layout.num_tokens for layout in layouts[:-1])])
    columns: dict[str, NDArray[Any]] = {}
    for field in fields(PackedBatch):
        values = [getattr(layout, field.name) for layout in layouts]
        if field.name in PACKED_INDICES:
            values = [value + shift for value, shift in zip(values, shifts, strict=True)]
        columns[field.name] = _join(values, values[0].dtype)
    return PackedBatch(**columns)


def _pad(batch: PackedBatch, align: int) -> PackedBatch:
    """Append roots of one token that see themselves alone, so that no row of the mask is empty."""
    num_padding = -batch.num_tokens % align
    if num_padding == 0:
        return batch
    zeros = np.zeros(num_padding, np.int64)
    ends = batch.num_tokens + 1 + np.arange(num_padding)
    return replace(
        batch,
        input_ids=_join([batch.input_ids, zeros], np.int64),
        position_ids=_join([batch.position_ids, zeros], np.int64),
        end=_join([batch.end, ends], np.int32),
    )


def _join(arrays: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate(arrays).astype(dtype, copy=False)
