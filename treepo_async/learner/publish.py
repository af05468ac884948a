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
from treepo_async.metrics.categories import Category
from treepo_async.metrics.events import emit
from treepo_async.metrics.spans import span
from treepo_async.types import Float32, Int32, PolicyVersion, Trajectory, Tree
from treepo_async.weights.manifest import Probe, TensorInfo
from treepo_async.weights.store import Apart, NamedTensor, WeightStore, at_once

PROBE_SEQUENCES = 2
PROBE_TOKENS = 8
"""Of a sequence: any log-prob but the first depends on every tensor of all layers, and the engine takes no request while it computes them."""
ROOM_S = 1.0
"""Between two attempts to write."""
TRACK = "weights"
"""Of the stages of a publication, in the trace."""

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""As safetensors spells them."""


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
    published_at = time.time()
    probe = probe_of(policy, sequences)
    with span("write", Category.SYNC, track=TRACK, version=str(version)):
        return store.publish(
            version,
            named_tensors(policy.export(), dtype),
            config_file=config_file,
            probe=probe,
            evaluate=evaluate,
            apart=apart,
            published_at=published_at,
        )


def probe_of(policy: Policy, sequences: Sequence[Int32]) -> Probe:
    """Sequences [T] with the log-probs that the current weights give them."""
    with span("probe", Category.SYNC, track=TRACK):
        scored = policy.score(sequences)
    return Probe(
        token_ids=[s.tolist() for s in sequences],
        logprobs=[logprobs.tolist() for logprobs in scored],
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
    """The end of the first trajectory of a few trees, prompt included, [T] each."""
    chosen = []
    for tree in trees[:PROBE_SEQUENCES]:
        trajectory = Trajectory(tree, leaf=0)
        whole = np.concatenate([tree.prompt.token_ids, trajectory.token_ids])
        chosen.append(whole[-PROBE_TOKENS:])
    return chosen


def named_tensors(tensors: Iterable[tuple[str, Any]], dtype: torch.dtype) -> Iterator[NamedTensor]:
    """Torch tensors as bytes: of the model itself where it lies in host memory in that dtype, so valid until the next update."""
    for name, tensor in tensors:
        yield NamedTensor(
            name, TensorInfo(DTYPE_NAMES[dtype], tuple(tensor.shape)), host_bytes(tensor, dtype)
        )


def host_bytes(tensor: Any, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor in a dtype, row-major, without a copy where it has them so."""
    # converted where it lies: of two dtypes the bytes of one travel
    flat = tensor.detach().to(dtype).contiguous().view(-1)
    return memoryview(_on_host(flat).view(torch.uint8).numpy())


def _on_host(tensor: Any) -> Any:
    """A tensor in host memory; from CUDA by way of page-locked memory, which torch keeps for the next time and copies to 50 times as fast."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
