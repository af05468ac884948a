"""From the learner's parameters to a publication, with a probe that proves what an engine has loaded.

Waits: where a publication cannot be written, as on a full disk, for whoever makes room (a person; `timeout_s`).
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from treepo_async.errors import WeightsError
from treepo_async.metrics.events import emit
from treepo_async.types import Float32, Int32, PolicyVersion, Trajectory, Tree
from treepo_async.weights.manifest import Probe, TensorInfo
from treepo_async.weights.store import Apart, NamedTensor, WeightStore, at_once

PROBE_SEQUENCES = 4
PROBE_TOKENS = 256
ROOM_S = 1.0
"""Between two attempts to write."""

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class Policy(Protocol):
    """What is published."""

    def export(self) -> Iterator[tuple[str, Any]]:
        """Full HF tensors by name."""

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """Log-probs of each token but the first, at temperature 1."""


def publish(
    store: WeightStore,
    policy: Policy,
    version: PolicyVersion,
    sequences: Sequence[Int32],
    *,
    dtype: torch.dtype,
    config_file: Path,
    evaluate: bool,
    apart: Apart = at_once,
) -> Path:
    """Publish the current weights as `version`.

    Args:
        store: where.
        policy: the learner.
        version: new.
        sequences: [T] each, for the probe.
        dtype: of the published tensors.
        config_file: the model's `config.json`.
        evaluate: whether the version shall be evaluated.
        apart: see `WeightStore.publish`.

    Returns:
        The folder of the publication.
    """
    probe = Probe(
        token_ids=[s.tolist() for s in sequences],
        logprobs=[logprobs.tolist() for logprobs in policy.score(sequences)],
    )
    return store.publish(
        version,
        named_tensors(policy.export(), dtype),
        config_file=config_file,
        probe=probe,
        evaluate=evaluate,
        apart=apart,
    )


def when_there_is_room(
    publishing: Callable[[], Path], *, timeout_s: float, apart: Apart = at_once
) -> Path:
    """Publish as soon as the disk takes it. Gives the folder.

    Args:
        publishing: `publish`; an attempt that failed leaves nothing.
        timeout_s: how long the disk may refuse.
        apart: how to wait.

    Raises:
        WeightsError: it did so all the time.
    """
    deadline = time.monotonic() + timeout_s
    is_told = False
    while True:
        try:
            return publishing()
        except OSError as error:
            reason = f"the weights cannot be published: {error}"
            if time.monotonic() > deadline:
                raise WeightsError(f"{reason}; make room there, then go on with the run") from error
            if not is_told:
                emit("alarm", alarm="a publication waits for room on disk", detail=reason)
            is_told = True
            apart(partial(time.sleep, ROOM_S))


def probe_sequences(trees: Sequence[Tree]) -> list[Int32]:
    """Prompt and first trajectory of a few trees, [T] each."""
    chosen = []
    for tree in trees[:PROBE_SEQUENCES]:
        trajectory = Trajectory(tree, leaf=0)
        chosen.append(np.concatenate([tree.prompt.token_ids, trajectory.token_ids])[:PROBE_TOKENS])
    return chosen


def named_tensors(tensors: Iterable[tuple[str, Any]], dtype: torch.dtype) -> Iterator[NamedTensor]:
    """Torch tensors as bytes."""
    for name, tensor in tensors:
        flat = tensor.detach().to("cpu", dtype).contiguous()
        data = flat.view(torch.uint8).numpy().tobytes()
        yield NamedTensor(name, TensorInfo(_DTYPE_NAMES[dtype], tuple(flat.shape)), data)
