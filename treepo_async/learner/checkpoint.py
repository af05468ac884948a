"""From a learner to a checkpoint and back. Neighbours: `weights.checkpoints` has the folder, `team` the tensors.

Invariants: tensors travel under Hugging Face's names, gathered and cut by the same map as the model's weights, so a checkpoint
says nothing of the layout that wrote it; they are float32 whatever the model's dtype, for a bfloat16 model the master weights.
Of random generators it has one state, that of rank 0's CPU: dropout is 0, so ranks draw nothing of their own and nothing on CUDA.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
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
from treepo_async.weights.store import Apart, NamedTensor, at_once


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
    ancestry: Mapping[int, int] | None = None,
    apart: Apart = at_once,
) -> Path:
    """Write a checkpoint of the current weights, the optimizer and this process's CPU generator. Gives its folder.

    Args:
        store: where.
        policy: the learner.
        version: of the weights.
        layout: of the learner, for the record.
        probe_sequences: [T] each, with which a publication of these weights will be proven.
        ancestry: see `Ancestry.equal`.
        apart: see `CheckpointStore.save`.

    Raises:
        WeightsError: it cannot be written. The other ranks have gathered all they were asked for even then.
    """
    state = TrainingState(
        version=str(version),
        num_updates=policy.num_updates,
        layout=layout,
        rng=torch.get_rng_state().numpy().tobytes().hex(),
        probe_token_ids=[ids.tolist() for ids in probe_sequences],
        ancestry={str(lineage): step for lineage, step in (ancestry or {}).items()},
    )
    with closing(_exported(policy)) as kinds:
        return store.save(state, kinds, apart=apart)


def _exported(policy: Trained) -> Generator[tuple[str, Iterator[NamedTensor]], None, None]:
    """(kind, its tensors), each gathered to the end: the other ranks do, whether it can be written or not."""
    for kind in (WEIGHTS, *MOMENTS):
        tensors = named_tensors(policy.export(kind), torch.float32)
        try:
            yield kind, tensors
        finally:
            for _ in tensors:
                pass


def load(learner: Learner, checkpoint: Checkpoint) -> None:
    """Restore this rank's share of a checkpoint, and its CPU generator as that of rank 0 was; every rank must.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    learner.restore(
        lambda kind: open_file(checkpoint.folder / file_of(kind)), checkpoint.state.num_updates
    )
    rng = bytearray.fromhex(checkpoint.state.rng)
    torch.set_rng_state(torch.frombuffer(rng, dtype=torch.uint8))
