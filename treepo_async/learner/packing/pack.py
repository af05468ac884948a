"""Pieces of trees to microbatches: every unique token of a piece once, in depth-first pre-order.

Axis letters: `L` leaves and `D` grid levels of a tree, `T` packed tokens, `E` trained tokens, `M` trained segments ("slots"), `J`
trajectories, `K` pairs of a trajectory and a slot on its path. Neighbours: `geometry` places the segments of a piece, `divide` chooses
the pieces, `attention` reads `end`, the losses read the floats per trained token. Pure numpy.

Invariant: `k` is on the path of `q` exactly when `k <= q < end[k]`; `geometry` says why.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import TreeError
from treepo_async.learner.packing.geometry import Geometry, by_level
from treepo_async.learner.packing.piece import Piece
from treepo_async.types import ROOT, Tree

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
    positive: Float64
    """[E], P: sum of w * max(A, 0) over the piece's leaves below, weight and advantage those of the token's level."""
    negative: Float64
    """[E], N: sum of w * max(-A, 0) over the piece's leaves below."""
    weight: Float64
    """[E], W: sum of w over the piece's leaves below. All three are divided by the normalizer of the batch already."""
    count: Float32
    """[E], number of the piece's leaves below."""
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
    slot: Int64
    """[E], the token's segment as an index into the slots, ascending."""
    slot_tree: Int64
    """[M], index into the sequence of trees that was packed."""
    slot_segment: Int64
    """[M], index into the segments of that tree."""
    slot_parent: Int64
    """[M], slot of the parent, below its own index; `ROOT` where that is the prompt."""
    path_trajectory: Int64
    """[K], which trajectory of the microbatch ..."""
    path_slot: Int64
    """[K], ... has which slot on its path; every trajectory is whole."""
    path_positive: Float64
    """[K], w * max(A, 0) of that trajectory at that slot, for each of its tokens."""
    path_negative: Float64
    """[K], w * max(-A, 0)."""

    @property
    def num_tokens(self) -> int:
        """Packed tokens, padding included: T."""
        return len(self.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Trained tokens, each counted once: E."""
        return len(self.target)

    @property
    def num_slots(self) -> int:
        """M."""
        return len(self.slot_tree)

    @property
    def num_trajectories(self) -> int:
        """J."""
        return int(self.path_trajectory[-1]) + 1 if len(self.path_trajectory) else 0

    def segments(self) -> Iterator[tuple[int, int, slice]]:
        """Yield (tree, segment, its slice of the E axis) for every slot; a segment may have several, in as many pieces."""
        stops = np.cumsum(np.bincount(self.slot, minlength=len(self.slot_tree))).tolist()
        starts = [0, *stops][: len(stops)]
        for slot, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            yield int(self.slot_tree[slot]), int(self.slot_segment[slot]), slice(start, stop)


SHIFTED: Mapping[str, Callable[[PackedBatch], int]] = MappingProxyType(
    {
        "end": attrgetter("num_tokens"),
        "prev": attrgetter("num_tokens"),
        "target": attrgetter("num_tokens"),
        "slot": attrgetter("num_slots"),
        "slot_parent": attrgetter("num_slots"),
        "path_slot": attrgetter("num_slots"),
        "path_trajectory": attrgetter("num_trajectories"),
    }
)
"""Fields that hold indices, and the length of the axis they point into: they move with the place of a piece in its
microbatch."""


def pack(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    weights: Sequence[Float64],
    microbatches: Sequence[Sequence[Piece]],
    align: int = 1,
) -> list[PackedBatch]:
    """Lay pieces of trees out in microbatches.

    Args:
        trees: that the pieces are of.
        advantages: A, per tree one number per leaf, `[L]`, or one per leaf and level, `[L, D]`; what stands behind a
            leaf's own last level is not read.
        weights: w, as `advantages`: what a token of a trajectory weighs in the loss.
        microbatches: pieces of each; one without any becomes an `empty_batch`.
        align: every microbatch is padded to a multiple of this with roots that see only themselves.

    Raises:
        TreeError: the advantages or weights of a tree have another shape, or a leaf of a piece has some that are NaN.
    """
    packed = []
    for pieces in microbatches:
        layouts = [_lay_out(trees[p.tree], advantages[p.tree], weights[p.tree], p) for p in pieces]
        packed.append(_pad(_concatenate(layouts), align) if layouts else empty_batch(align))
    return packed


def pack_sequences(
    sequences: Sequence[Int32], budget_tokens: int, align: int = 1
) -> list[PackedBatch]:
    """Lay plain sequences out like trees of one path, every token after the first trained at temperature 1.

    `slot_tree` counts the sequences; advantages are 0, `weight` and `count` are 1.

    Raises:
        TreeError: a sequence is empty.
    """
    layouts = [_lay_out_sequence(token_ids, i) for i, token_ids in enumerate(sequences)]
    groups = next_fit([layout.num_tokens for layout in layouts], budget_tokens)
    return [_pad(_concatenate([layouts[i] for i in group]), align) for group in groups]


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


def _lay_out(tree: Tree, advantages: Float64, weights: Float64, piece: Piece) -> PackedBatch:
    """One piece as a microbatch of its own, without padding."""
    chosen = list(piece.leaves)
    advantages_JD = by_level(tree, advantages, f"advantages[{piece.tree}]")[chosen]
    weights_JD = by_level(tree, weights, f"weights[{piece.tree}]")[chosen]
    if np.isnan(advantages_JD[:, 0]).any():
        raise TreeError(
            f"a piece of tree {piece.tree} has a leaf whose advantage is NaN: leave it out"
        )
    positive_JD = weights_JD * np.maximum(advantages_JD, 0.0)
    negative_JD = weights_JD * np.maximum(-advantages_JD, 0.0)

    place, prompt_P = Geometry(tree, piece.leaves), tree.prompt.token_ids
    segments, count = [tree.segments[i] for i in place.segment_M], len(place.index_T)

    def per_token(values: Iterable[Any], dtype: type) -> NDArray[Any]:
        return place.spread(np.array(list(values), dtype))

    return PackedBatch(
        input_ids=_join([prompt_P, *(s.token_ids for s in segments)], np.int64),
        position_ids=_join([np.arange(len(prompt_P)), place.depth()], np.int64),
        end=_join([np.full(len(prompt_P), len(prompt_P) + count), place.end()], np.int32),
        prev=place.prev(),
        target=place.index_T,
        positive=place.spread(place.sums(positive_JD)),
        negative=place.spread(place.sums(negative_JD)),
        weight=place.spread(place.sums(weights_JD)),
        count=place.spread(place.sums(np.ones_like(weights_JD))).astype(np.float32),
        behavior_logprobs=_join([s.behavior_logprobs for s in segments], np.float32),
        temperature=np.full(count, tree.sampling.temperature, np.float32),
        policy_step=per_token((s.policy_version.step for s in segments), np.int64),
        lineage=per_token((s.policy_version.lineage for s in segments), np.int64),
        mixed_context=per_token((s.mixed_context for s in segments), np.bool_),
        level=per_token((s.level for s in segments), np.int32),
        slot=per_token(range(len(segments)), np.int64),
        slot_tree=np.full(len(segments), piece.tree, np.int64),
        slot_segment=place.segment_M,
        slot_parent=place.parent_M,
        path_trajectory=place.path_leaf_K,
        path_slot=place.path_slot_K,
        path_positive=place.along(positive_JD),
        path_negative=place.along(negative_JD),
    )


def _lay_out_sequence(token_ids: Int32, tree_index: int) -> PackedBatch:
    """One plain sequence as a microbatch of its own, without padding: a path of one segment, or of none."""
    if len(token_ids) == 0:
        raise TreeError(f"sequences[{tree_index}] is empty; it needs at least one token")
    num_tokens, num_trained = len(token_ids), len(token_ids) - 1
    zeros, ones = np.zeros(num_trained, np.int64), np.ones(num_trained)
    one = np.zeros(min(num_trained, 1), np.int64)
    return PackedBatch(
        input_ids=token_ids.astype(np.int64),
        position_ids=np.arange(num_tokens),
        end=np.full(num_tokens, num_tokens, np.int32),
        prev=np.arange(num_trained),
        target=np.arange(1, num_tokens),
        positive=zeros.astype(np.float64),
        negative=zeros.astype(np.float64),
        weight=ones,
        count=ones.astype(np.float32),
        behavior_logprobs=zeros.astype(np.float32),
        temperature=ones.astype(np.float32),
        policy_step=zeros,
        lineage=zeros,
        mixed_context=zeros.astype(np.bool_),
        level=zeros.astype(np.int32),
        slot=zeros,
        slot_tree=one + tree_index,
        slot_segment=one,
        slot_parent=one + ROOT,
        path_trajectory=one,
        path_slot=one,
        path_positive=one.astype(np.float64),
        path_negative=one.astype(np.float64),
    )


def _concatenate(layouts: Sequence[PackedBatch]) -> PackedBatch:
    columns: dict[str, NDArray[Any]] = {}
    for field in fields(PackedBatch):
        values = [getattr(layout, field.name) for layout in layouts]
        if length_of := SHIFTED.get(field.name):
            sizes = [length_of(layout) for layout in layouts]
            shifts = np.cumsum([0, *sizes[:-1]])
            values = [
                np.where(value == ROOT, ROOT, value + shift)
                for value, shift in zip(values, shifts, strict=True)
            ]
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
