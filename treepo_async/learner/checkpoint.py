"""From a learner to a checkpoint and back. Neighbours: `weights.checkpoints` has the folder, `team` the tensors.

Invariants: tensors travel under Hugging Face's names, gathered and cut by the same map as the model's weights, so a checkpoint
says nothing of the layout that wrote it; they are float32 whatever the model's dtype, for a bfloat16 model the master weights.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from treepo_async.learner.model.hf_files import open_file
from treepo_async.learner.optimizer import MOMENTS
from treepo_async.learner.publish import named_tensors
from treepo_async.learner.step import WEIGHTS, Learner
from treepo_async.types import Int32, PolicyVersion
from treepo_async.weights.checkpoints import (
    Checkpoint,
    CheckpointStore,
    TrainingState,
    file_of,
)
from treepo_async.weights.store import Apart, at_once


class Trained(Protocol):
    """What is saved."""

    @property
    def num_updates(self) -> int:
        """Updates the optimizer has made."""

    def export(self, kind: str = WEIGHTS) -> Iterator[tuple[str, Any]]:
        """Full tensors by HF name."""


def save(
    store: CheckpointStore,
    policy: Trained,
    version: PolicyVersion,
    *,
    layout: str,
    probe_sequences: Sequence[Int32],
    apart: Apart = at_once,
) -> Path:
    """Write a checkpoint of the current weights and optimizer. Gives its folder.

    Args:
        store: where.
        policy: the learner.
        version: of the weights.
        layout: of the learner, for the record.
        probe_sequences: [T] each, with which a publication of these weights will be proven.
        apart: see `CheckpointStore.save`.
    """
    state = TrainingState(
        version=str(version),
        num_updates=policy.num_updates,
        layout=layout,
        rng=torch.get_rng_state().numpy().tobytes().hex(),
        probe_token_ids=[ids.tolist() for ids in probe_sequences],
    )
    kinds = (
        (kind, named_tensors(policy.export(kind), torch.float32)) for kind in (WEIGHTS, *MOMENTS)
    )
    return store.save(state, kinds, apart=apart)


def load(learner: Learner, checkpoint: Checkpoint) -> None:
    """Restore this rank's share of a checkpoint; every rank must.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    learner.restore(
        lambda kind: open_file(checkpoint.folder / file_of(kind)), checkpoint.state.num_updates
    )
    rng = bytearray.fromhex(checkpoint.state.rng)
    torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
