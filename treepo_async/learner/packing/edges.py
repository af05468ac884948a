"""The trained tokens of a microbatch on the device: what losses, corrections and masks read.

Axis letters: `E` trained tokens, `M` slots (segments), `J` trajectories, `K` pairs of a trajectory and a slot on its path; the
names are those of `pack.PackedBatch`. Neighbours: `step` makes them, `objective` reads them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from treepo_async.learner.packing.pack import Int64, PackedBatch, edge_values
from treepo_async.learner.packing.share import SegmentValues
from treepo_async.types import NO_LINEAGE, PolicyVersion

UNKNOWN_LAG = -1
"""Lag of tokens that no run of weights sampled: trees from a file."""


@dataclass(frozen=True, slots=True)
class Edges:
    """The trained tokens of a microbatch."""

    prev: Tensor
    """[E], packed index of the predecessor."""
    label: Tensor
    """[E], token id."""
    temperature: Tensor
    """[E]"""
    positive: Tensor
    """[E], P."""
    negative: Tensor
    """[E], N."""
    weight: Tensor
    """[E], W."""
    count: Tensor
    """[E], trajectories through the token."""
    behavior_logprobs: Tensor
    """[E]"""
    proximal_logprobs: Tensor | None
    """[E], under the weights at the start of the batch; None: not computed."""
    reference_logprobs: Tensor | None
    """[E], under the reference policy; None: not computed."""
    is_fresh: Tensor
    """bool [E], whether sampled, with a KV cache of one version, under the version trained from."""
    lag: Tensor
    """int64 [E], publications between the version that sampled and the one trained from; at least 1 where it is another one;
    `UNKNOWN_LAG` for trees from a file."""
    level: Tensor
    """int64 [E], grid level."""
    slot: Tensor
    """int64 [E], ascending."""
    slot_parent: Tensor
    """int64 [M], `ROOT` under the prompt."""
    path_trajectory: Tensor
    """int64 [K]"""
    path_slot: Tensor
    """int64 [K]"""
    path_positive: Tensor
    """[K], w * max(A, 0) of the trajectory at the slot, for each of its tokens."""
    path_negative: Tensor
    """[K], w * max(-A, 0)."""

    @property
    def num_slots(self) -> int:
        """M."""
        return len(self.slot_parent)

    @classmethod
    def of(
        cls,
        batch: PackedBatch,
        device: torch.device,
        *,
        version: PolicyVersion | None = None,
        proximal: Sequence[SegmentValues] | None = None,
        reference: Sequence[SegmentValues] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Move the trained tokens of a microbatch to the device.

        Args:
            batch: the microbatch.
            device: of the model.
            version: trained from; None: no token is fresh, and none has a known lag.
            proximal: per packed tree; None: not computed.
            reference: as `proximal`.
            dtype: of everything that is no index.
        """

        def place(values: np.ndarray) -> Tensor:
            found = torch.from_numpy(np.ascontiguousarray(values)).to(device)
            return found.to(dtype) if found.is_floating_point() else found

        def known(values: Sequence[SegmentValues] | None) -> Tensor | None:
            return None if values is None else place(edge_values(batch, values))

        lag = _lag(batch, version)
        return cls(
            prev=place(batch.prev),
            label=place(batch.input_ids[batch.target]),
            temperature=place(batch.temperature),
            positive=place(batch.positive),
            negative=place(batch.negative),
            weight=place(batch.weight),
            count=place(batch.count),
            behavior_logprobs=place(batch.behavior_logprobs),
            proximal_logprobs=known(proximal),
            reference_logprobs=known(reference),
            is_fresh=place((lag == 0) & ~batch.mixed_context),
            lag=place(lag),
            level=place(batch.level.astype(np.int64)),
            slot=place(batch.slot),
            slot_parent=place(batch.slot_parent),
            path_trajectory=place(batch.path_trajectory),
            path_slot=place(batch.path_slot),
            path_positive=place(batch.path_positive),
            path_negative=place(batch.path_negative),
        )


def _lag(batch: PackedBatch, version: PolicyVersion | None) -> Int64:
    """[E]; see `Edges.lag`."""
    if version is None:
        return np.full(batch.num_trained_tokens, UNKNOWN_LAG)
    behind = version.step - batch.policy_step
    other = (batch.lineage != version.lineage) | (behind < 0)
    lag = np.where(other, np.maximum(behind, 1), behind)
    return np.where(batch.lineage == NO_LINEAGE, UNKNOWN_LAG, lag)
