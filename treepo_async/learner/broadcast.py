"""One rank's part in a broadcast of weights: the first rank of each pipeline stage keeps copies and sends them, the others help to gather.

Neighbours: `team` has every rank copy at a publication, `broadcast_sender` sends beside the training, `publish` offers what was copied.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch

from treepo_async.learner.broadcast_copy import Copies
from treepo_async.learner.broadcast_group import Meeting
from treepo_async.learner.broadcast_sender import Connect, Sender
from treepo_async.learner.groups import is_stage_lead, words_to_first_stage
from treepo_async.learner.mcore import parallel_state
from treepo_async.types import PolicyVersion
from treepo_async.weights.parcel import StagePart

CUDA_BUCKET_BYTES, CPU_BUCKET_BYTES = 256 * 2**20, 24 * 2**20
"""Few calls a version; on CPU in blocks that glibc uses again once they are freed, which it does up to 32 MiB."""


@dataclass
class StageBroadcast:
    """See the module."""

    copies: Copies
    is_first_replica: bool
    sender: Sender | None
    """None where this rank sends nothing."""

    @classmethod
    def open(
        cls, connect: Connect, *, address: str, bucket_bytes: int | None, timeout_s: float
    ) -> Self:
        """Begin to send where this rank is to; needs opened groups.

        Args:
            connect: to the desk.
            address: of this node, as engines reach it.
            bucket_bytes: tensors that are sent together; None: as suits the device.
            timeout_s: of an engine's part.
        """
        default = CUDA_BUCKET_BYTES if torch.cuda.is_available() else CPU_BUCKET_BYTES
        copies, sender = Copies(bucket_bytes or default), None
        if is_stage_lead():
            stage = parallel_state.get_pipeline_model_parallel_rank()
            sender = Sender(stage, copies, Meeting(address), connect, timeout_s=timeout_s)
        is_first = parallel_state.get_data_parallel_rank() == 0
        return cls(copies, is_first, sender)

    def copy(
        self,
        version: PolicyVersion,
        tensors: Iterator[tuple[str, Any]],
        dtype: torch.dtype,
        *,
        keep: Collection[PolicyVersion],
    ) -> list[StagePart]:
        """Copy a version, every rank of the world together. Gives every stage's part on rank 0, nothing elsewhere.

        Args:
            version: of the weights.
            tensors: of `hf.export_stage`.
            dtype: of the copy.
            keep: versions that stay.

        Raises:
            WeightsError: nobody could be sent it.
        """
        if not self.is_first_replica:
            return []
        if self.sender is None:
            for _ in tensors:
                raise AssertionError("only the first rank of a stage is given tensors")
            words_to_first_stage(None)
            return []
        self.sender.check()
        part = self.copies.add(version, tensors, dtype, keep=keep)
        return [StagePart.of_words(words) for words in words_to_first_stage(part.to_words())]

    def close(self) -> None:
        """Send no more."""
        if self.sender is not None:
            self.sender.close()
