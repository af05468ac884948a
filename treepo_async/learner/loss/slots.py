"""Sums over the slots (segments) of a microbatch: what ratios of trajectories and masks of segments are made of.

Axis letters as in `edges`: `E` trained tokens, `M` slots. Neighbours: `loss`, `mask`. Pure torch, differentiable.
"""

import torch
from torch import Tensor

from treepo_async.learner.packing.edges import Edges


def sum_by(index: Tensor, values: Tensor, length: int) -> Tensor:
    """The sum of the values that have each index from 0 to `length` - 1, [length]."""
    return values.new_zeros(length).index_add(0, index, values)


def slot_sums(edges: Edges, values_E: Tensor) -> Tensor:
    """Sum over the tokens of each slot, [M]."""
    return sum_by(edges.slot, values_E, edges.num_slots)


def slot_means(edges: Edges, values_E: Tensor) -> Tensor:
    """Mean over the tokens of each slot, [M]."""
    return slot_sums(edges, values_E) / slot_lengths(edges).to(values_E.dtype)


def slot_lengths(edges: Edges) -> Tensor:
    """Tokens of each slot, int64 [M]; none is without."""
    return slot_sums(edges, torch.ones_like(edges.slot))


def slot_values(edges: Edges, values_E: Tensor) -> Tensor:
    """[M] of numbers that are the same for all tokens of a slot, [E]."""
    return values_E.new_zeros(edges.num_slots).index_copy(0, edges.slot, values_E)
