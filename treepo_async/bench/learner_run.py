"""Forward and backward of the same trajectories in each way, timed in turn on one model.

A round runs every way once, another one first each time. Before the first round every way runs twice untimed: to warm up, and for its
peak memory and gradient. Neighbours: `learner_trees` makes the trees, `learner.packing.divide` the microbatches of each way,
`learner_gradient` compares, `peak` counts memory.

Invariant: the model is never updated, so all runs compute the same; tree and flat packing must give the same gradient.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from treepo_async.bench.learner_cells import LearnerCell, Way
from treepo_async.bench.learner_gradient import Gradients, copied, norm, worst_gap
from treepo_async.bench.learner_samples import LearnerSample, Origin
from treepo_async.bench.learner_shapes import find_shape
from treepo_async.bench.learner_trees import leaf_values, lengths_of, padded, trees_of
from treepo_async.bench.peak import peak_bytes
from treepo_async.config.layout import Layout
from treepo_async.errors import TreepoError
from treepo_async.learner.build import MakeOptimizer, build_dummy
from treepo_async.learner.groups import close_groups, device, open_groups
from treepo_async.learner.loss.normalizer import loss_weights
from treepo_async.learner.packing.cost import CostModel, Load, flops, load_of
from treepo_async.learner.packing.divide import divide
from treepo_async.learner.packing.share import Share
from treepo_async.learner.shape import ModelShape
from treepo_async.learner.step import Learner
from treepo_async.types import Tree

GROUP_TIMEOUT_S = 120.0
GAPS = {"float32": 1e-4, "bfloat16": 0.05}
"""Largest relative difference of a tensor's gradient between tree and flat packing, by the dtype of the model."""


class DifferentGradientError(TreepoError):
    """Two ways of computing one gradient gave two."""


class _NoUpdate:
    """In the place of an optimizer: the gradient is left as it is."""

    learning_rate = 0.0

    def __init__(self, model: Any) -> None:
        """Leave a model as it is."""

    def round_master(self) -> None:
        """Nothing to round: the weights are the model's own."""

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
    return build_dummy(
        find_shape(cell.shape),
        make_optimizer=cast(MakeOptimizer, _NoUpdate),
        microbatch_tokens=cell.budget,
        dtype=getattr(torch, cell.dtype),
        attention=cell.attention,
        recompute=cell.recompute,
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


@dataclass(frozen=True, slots=True)
class Warmed:
    """What a pass of a way takes and leaves."""

    peak_bytes: int
    gradient_norm: float
    gradient_gap: float
    """See `LearnerSample`."""


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
    if len(set(lengths_of(trees))) > 1:
        shares[Way.PADDED] = _share(padded(trees), cell, Way.FLAT.value, cost)
    whole = sum(flops(shape, load_of(t, range(len(t.leaves)))).total for t in trees)
    return {way: _job(share, shape, cost, whole, choice) for way, share in shares.items()}


def warm_up(learner: Learner, jobs: Mapping[Way, Job], dtype: str) -> dict[Way, Warmed]:
    """Run every way once, and then once more to see what it takes and leaves.

    Raises:
        DifferentGradientError: tree and flat packing do not agree.
    """
    for job in jobs.values():
        learner.train(job.share)
    found = {Way.FLAT: _look(learner, jobs[Way.FLAT], None, dtype)}
    expected = copied(learner.model)
    for way, job in jobs.items():
        if way is not Way.FLAT:
            # padding is attended to, so its gradient is another one
            comparable = None if way is Way.PADDED else expected
            found[way] = _look(learner, job, comparable, dtype)
    return found


def _look(learner: Learner, job: Job, expected: Gradients | None, dtype: str) -> Warmed:
    peak = peak_bytes(partial(learner.train, job.share))
    gap, name = (0.0, "") if expected is None else worst_gap(learner.model, expected)
    if gap > GAPS[dtype]:
        raise DifferentGradientError(
            f"the gradient of {name} differs from that of flat packing by {gap:.2g} of its norm; they must be the same "
            f"within {GAPS[dtype]:g}"
        )
    return Warmed(peak, norm(learner.model), gap)


def measure(
    learner: Learner,
    cell: LearnerCell,
    jobs: Mapping[Way, Job],
    warmed: Mapping[Way, Warmed],
    number: int,
    origin: Origin,
) -> list[LearnerSample]:
    """One round.

    Args:
        learner: from `build`.
        cell: that the jobs are of.
        jobs: from `jobs_of`.
        warmed: from `warm_up`.
        number: of the round, from 1.
        origin: of this process.
    """
    ways = list(jobs)
    first = (number - 1) % len(ways)
    samples = []
    for place, way in enumerate([*ways[first:], *ways[:first]], start=1):
        job = jobs[way]
        wall_s, cpu_s = _timed(partial(learner.train, job.share))
        pieces = [piece for chosen in job.share.microbatches for piece in chosen]
        samples.append(
            LearnerSample(
                cell=cell,
                code=origin.code,
                device=origin.device,
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
                peak_bytes=warmed[way].peak_bytes,
                gradient_norm=warmed[way].gradient_norm,
                gradient_gap=warmed[way].gradient_gap,
            )
        )
    return samples


def _share(trees: Sequence[Tree], cell: LearnerCell, packing: str, cost: CostModel) -> Share:
    advantages = leaf_values(trees)
    weights = loss_weights(trees, advantages, "token_mean")
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


def _synchronize() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
