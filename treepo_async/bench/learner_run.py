"""Forward and backward of the same trajectories in each way, timed in turn on one model.

A round runs every way once, another one first each time. Before the first round every way runs once untimed: it warms up, and its peak
memory and gradient norm are taken. Neighbours: `learner_trees` makes the trees, `learner.packing.divide` the microbatches of each way.

Invariant: the model is never updated, so all runs compute the same; tree and flat packing must give the same gradient norm.
"""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from treepo_async.bench.learner_cells import LearnerCell, Way
from treepo_async.bench.learner_samples import LearnerSample
from treepo_async.bench.learner_shapes import find_shape
from treepo_async.bench.learner_trees import leaf_values, padded, trees_of
from treepo_async.config.layout import Layout
from treepo_async.errors import TreepoError
from treepo_async.learner.attention.plan import alignment
from treepo_async.learner.groups import close_groups, device, open_groups
from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.loss.objective import LossSettings, Objective
from treepo_async.learner.model.gpt import ModelSettings, build_model
from treepo_async.learner.model.hf import dummy, load
from treepo_async.learner.packing.cost import CostModel, Load, flops, load_of
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.share import Share
from treepo_async.learner.shape import ModelShape
from treepo_async.learner.step import Learner
from treepo_async.types import Tree

GROUP_TIMEOUT_S = 120.0
GAPS = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest relative difference of the gradient norms of tree and flat packing, by the dtype of the model."""


class DifferentGradientError(TreepoError):
    """Two ways of computing one gradient gave two."""


class _NoUpdate:
    """In the place of an optimizer: the gradient is left as it is."""

    learning_rate = 0.0

    def zero_grad(self) -> None:
        """Nothing to forget: the model zeroes its own buffer."""

    def update(self, *, finite_loss: bool) -> tuple[float, bool]:
        """Make none."""
        return math.nan, not finite_loss


@contextmanager
def one_rank() -> Iterator[None]:
    """Process groups of this process alone."""
    # here, because a machine that only measures may have no psutil, which `process` needs
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    open_groups(Layout(), rank=0, address=address, timeout_s=GROUP_TIMEOUT_S)
    try:
        yield
    finally:
        close_groups()


def build(cell: LearnerCell) -> Learner:
    """A learner of random weights without an optimizer, so that its memory is that of forward and backward."""
    shape = find_shape(cell.shape)
    settings = ModelSettings(
        dtype=getattr(torch, cell.dtype), attention=cell.attention, recompute=cell.recompute
    )
    model = build_model(shape, settings)
    load(model, shape, dummy(shape, 0))
    return Learner(
        model,
        shape,
        cast(Any, _NoUpdate()),
        Objective(LossSettings()),
        cell.budget,
        align=alignment(cell.attention),
    )


@dataclass(frozen=True, slots=True)
class Job:
    """All trees of a cell, divided for one way."""

    share: Share
    load: Load
    flops: float
    whole_flops: float
    expected_s: float
    choice: Way


def jobs_of(cell: LearnerCell, shape: ModelShape) -> dict[Way, Job]:
    """The ways that differ for these trees: padding only where trajectories differ in length."""
    trees = trees_of(cell, shape.vocab_size)
    cost = CostModel.of(shape, cell.attention, microbatch_tokens=cell.budget)
    shares = {way: _share(trees, cell, way.value, cost) for way in (Way.TREE, Way.FLAT, Way.AUTO)}
    auto = shares.pop(Way.AUTO)
    choice = next(
        (way for way, share in shares.items() if share.microbatches == auto.microbatches), Way.AUTO
    )
    if choice is Way.AUTO:
        shares[Way.AUTO] = auto
    rows = padded(trees)
    if len({tuple(tree.num_tokens_L) for tree in rows}) > 1:
        shares[Way.PADDED] = _share(rows, cell, Way.FLAT.value, cost)
    whole = sum(flops(shape, load_of(t, range(len(t.leaves)))).total for t in trees)
    return {way: _job(share, shape, cost, whole, choice) for way, share in shares.items()}


def warm_up(learner: Learner, jobs: Mapping[Way, Job], dtype: str) -> dict[Way, tuple[int, float]]:
    """Run every way once. Gives the most memory that it took, and its gradient norm.

    Raises:
        DifferentGradientError: tree and flat packing do not agree.
    """
    found = {}
    for way, job in jobs.items():
        peak = _peak_bytes(partial(learner.train, job.share))
        found[way] = peak, _gradient_norm(learner)
    tree, flat = found[Way.TREE][1], found[Way.FLAT][1]
    if not abs(tree / flat - 1) < GAPS[dtype]:
        raise DifferentGradientError(
            f"the gradient norm is {tree} packed as trees and {flat} packed flat; they must be the same"
        )
    return found


def measure(
    learner: Learner,
    cell: LearnerCell,
    jobs: Mapping[Way, Job],
    warmed: Mapping[Way, tuple[int, float]],
    number: int,
) -> list[LearnerSample]:
    """One round.

    Args:
        learner: from `build`.
        cell: that the jobs are of.
        jobs: from `jobs_of`.
        warmed: from `warm_up`.
        number: of the round, from 1.
    """
    ways = list(jobs)
    first = (number - 1) % len(ways)
    samples = []
    for place, way in enumerate([*ways[first:], *ways[:first]], start=1):
        job = jobs[way]
        wall_s, cpu_s = _timed(partial(learner.train, job.share))
        peak_bytes, gradient_norm = warmed[way]
        pieces = [piece for chosen in job.share.microbatches for piece in chosen]
        samples.append(
            LearnerSample(
                cell=cell,
                way=way,
                round=number,
                place=place,
                trajectories=sum(len(piece.leaves) for piece in pieces),
                tokens=job.load.tokens,
                trained=job.load.trained,
                pieces=len(pieces),
                microbatches=len(job.share.microbatches),
                flops=job.flops,
                whole_flops=job.whole_flops,
                expected_s=job.expected_s,
                choice=job.choice,
                wall_s=wall_s,
                cpu_s=cpu_s,
                peak_bytes=peak_bytes,
                gradient_norm=gradient_norm,
            )
        )
    return samples


def _share(trees: Sequence[Tree], cell: LearnerCell, packing: str, cost: CostModel) -> Share:
    advantages = leaf_values(trees)
    weights = loss_weights(trees, advantages, "token_mean", response_limit=0)
    whole = Share(tuple(trees), tuple(advantages), tuple(weights))
    (share,) = divide(whole, num_replicas=1, budget_tokens=cell.budget, packing=packing, cost=cost)
    return share


def _job(share: Share, shape: ModelShape, cost: CostModel, whole: float, choice: Way) -> Job:
    loads = [
        load_of(share.trees[piece.tree], piece.leaves)
        for chosen in share.microbatches
        for piece in chosen
    ]
    total = sum(loads, Load())
    return Job(share, total, flops(shape, total).total, whole, cost.cost(total), choice)


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    gc.collect()
    _synchronize()
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def _peak_bytes(work: Callable[[], object]) -> int:
    """Most memory above that before the work: of PyTorch's CUDA allocator, or of this process; 0 where nobody counts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return int(torch.cuda.max_memory_allocated() - before)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what was freed by earlier runs would hide what this one takes
    before = _of_process("VmRSS")
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
    work()
    return max(0, _of_process("VmHWM") - before)


def _of_process(key: str) -> int:
    """A size from /proc/self/status, in bytes; 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    sizes = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(sizes[0]) * 1024 if sizes else 0


def _gradient_norm(learner: Learner) -> float:
    squares = [weight.main_grad.double().square().sum() for weight in learner.model.parameters()]
    return math.sqrt(float(torch.stack(squares).sum()))


def _synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
