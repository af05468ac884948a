"""One optimizer update from one batch of trees.

`Learner.train` packs its share of the trees, runs forward and backward over all microbatches through Megatron's schedule, and applies
or skips the update. Neighbours: `pack` plans, `objective` scores, `optimizer` updates, `hf` exports; the worker calls it.

Invariant: the ranks of one data-parallel replica are given the same share, and all ranks return the same result; the
normalizer of the loss is in the weights that a share carries, so nothing here divides.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async import chaos
from treepo_async.learner.groups import add_up, device, share_out, sum_stages
from treepo_async.learner.loss.objective import SUMS, Objective
from treepo_async.learner.loss.result import StepResult, loss_of, result_of
from treepo_async.learner.mcore import get_forward_backward_func, parallel_state
from treepo_async.learner.model.hf import Read, TensorOf, export, export_stage, load
from treepo_async.learner.optimizer import MOMENTS, Optimizer, master
from treepo_async.learner.packing.cost import CostModel
from treepo_async.learner.packing.edges import Edges
from treepo_async.learner.packing.pack import (
    Float32,
    Int32,
    PackedBatch,
    empty_batch,
    pack,
    pack_sequences,
)
from treepo_async.learner.packing.share import SegmentValues, Share
from treepo_async.learner.shape import ModelShape
from treepo_async.types import PolicyVersion

WEIGHTS = "weights"
"""The kind of tensors that `Learner.export` gives when not asked for a moment."""

OnLogprobs = Callable[[Edges, Tensor, Tensor], tuple[Tensor, Any]]
"""(trained tokens, log-probs [E], entropies [E]) -> (loss [], anything to keep)."""


class Learner:
    """A model, its optimizer and its loss on this rank."""

    def __init__(
        self,
        model: Any,
        shape: ModelShape,
        optimizer: Optimizer,
        objective: Objective,
        microbatch_tokens: int,
        align: int = 1,
        reference: Any = None,
    ) -> None:
        """Put together.

        Args:
            model: from `build_model`.
            shape: of the model.
            optimizer: of the model.
            objective: what is minimised.
            microbatch_tokens: most packed tokens of a microbatch.
            align: packed tokens are padded to a multiple of this.
            reference: the model as it was when the run began, frozen; None: nobody asks for it.
        """
        self.model = model
        self.shape = shape
        self.optimizer = optimizer
        self.objective = objective
        self.microbatch_tokens = microbatch_tokens
        self.align = align
        self.reference = reference
        self._dtype = torch.promote_types(torch.float32, next(model.parameters()).dtype)
        """Of everything that is computed from log-probs."""
        self.packing = "tree"
        """How trees are cut for it: a name in `config.schema.PACKINGS`."""
        self.cost = CostModel()
        """What its microbatches are evened out by."""

    @property
    def num_stages(self) -> int:
        """Of the pipeline."""
        stages: int = parallel_state.get_pipeline_model_parallel_world_size()
        return stages

    def train(self, share: Share, *, version: PolicyVersion | None = None) -> StepResult:
        """Make one update.

        Args:
            share: this replica's, from `divide`.
            version: the version the current weights were published as; parity and lag are measured against it.

        Raises:
            TreeError: a tree and its advantages, weights or log-probs do not fit.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()

        def place(batch: PackedBatch) -> Edges:
            return Edges.of(
                batch,
                device(),
                version=version,
                proximal=share.proximal,
                reference=share.reference,
                dtype=self._dtype,
            )

        def minimise(edges: Edges, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Any]:
            loss, sums, gap_max = self.objective(edges, logprobs, entropy, share.bounds)
            return loss, (sums, gap_max)

        batches = self._to_train(share)
        kept = self._run(self.model, batches, len(share.microbatches), place, minimise)
        sums, gap_max = _reduce(kept)
        finite_loss = math.isfinite(loss_of(sums))
        chaos.point("learner.before_optimizer")
        grad_norm, skipped = self.optimizer.update(finite_loss=finite_loss)
        return result_of(
            sums,
            gap_max,
            grad_norm=grad_norm,
            learning_rate=self.optimizer.learning_rate,
            skipped=skipped,
        )

    def logprobs(self, share: Share, *, of_reference: bool = False) -> list[SegmentValues]:
        """Log-probs of the trees of this replica, at their temperatures, the same on all its ranks.

        Args:
            share: this replica's.
            of_reference: under the reference policy instead of the current weights.

        Returns:
            Per tree and segment `[T]`; NaN for segments that are in no piece.
        """
        model = self.reference if of_reference else self.model
        found = [
            [np.full(len(s), np.nan, np.float32) for s in tree.segments] for tree in share.trees
        ]
        values = self._logprobs(model, self._lay_out(share), len(share.microbatches))
        for segments, logprobs in values:
            for tree, segment, edges in segments:
                found[tree][segment] = logprobs[edges]
        return [tuple(values) for values in found]

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """Log-probs of each token after the first under the current weights, at temperature 1.

        Args:
            sequences: token ids `[T]` each, at least one token; the same on every rank.

        Returns:
            `[T - 1]` each.
        """
        batches = pack_sequences(sequences, self.microbatch_tokens, self.align)
        mine = share_out(batches, empty_batch(self.align))
        sizes = [batch.num_trained_tokens for batch in batches]
        flat = torch.zeros(sum(sizes), device=device())
        views = share_out(flat.split(sizes), flat[:0])
        for view, (_, values) in zip(
            views, self._logprobs(self.model, iter(mine), len(mine)), strict=True
        ):
            view.copy_(torch.from_numpy(values))
        dist.all_reduce(flat, group=parallel_state.get_data_parallel_group())
        found = [np.empty(0, np.float32) for _ in sequences]
        for batch, tensor in zip(batches, flat.split(sizes), strict=True):
            for sequence, _, edges in batch.segments():
                found[sequence] = tensor.cpu().numpy()[edges]
        return found

    def export(self, kind: str = WEIGHTS) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors of the whole model on rank 0; `hf.export` has the terms.

        Args:
            kind: `weights`, of a bfloat16 model in float32, or the name of one of the optimizer's `MOMENTS`.
        """
        return export(self.model, self.shape, self._tensor_of(kind))

    def export_stage(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF weights of this pipeline stage on its first rank; `hf.export_stage` has the terms."""
        return export_stage(self.model, self.shape, self._tensor_of(WEIGHTS))

    def restore(self, read: Callable[[str], Read], num_updates: int) -> None:
        """Put back what `export` gave for every kind, in this or any other layout.

        Args:
            read: kind -> reader of its tensors.
            num_updates: updates the optimizer had made.

        Raises:
            ConfigError: a tensor is missing or of another shape.
        """
        self.optimizer.restore_count(num_updates)
        for kind in (WEIGHTS, *MOMENTS):
            load(self.model, self.shape, read(kind), self._tensor_of(kind))
        self.optimizer.round_master()

    def _tensor_of(self, kind: str) -> TensorOf:
        return master if kind == WEIGHTS else self.optimizer.moment(kind)

    def _to_train(self, share: Share) -> Iterator[PackedBatch]:
        for batch in self._lay_out(share):
            chaos.point("learner.forward")
            yield batch

    def _lay_out(self, share: Share) -> Iterator[PackedBatch]:
        """One microbatch at a time, as it is wanted: a batch may be large."""
        for pieces in share.microbatches:
            yield from pack(share.trees, share.advantages, share.weights, [pieces], self.align)

    @torch.no_grad()
    def _logprobs(
        self, model: Any, batches: Iterator[PackedBatch], num_microbatches: int
    ) -> list[tuple[list[tuple[int, int, slice]], Float32]]:
        """Segments and log-probs `[E]` of this replica's microbatches, on all of its ranks."""
        segments: list[list[tuple[int, int, slice]]] = []
        sizes: list[int] = []

        def noted() -> Iterator[PackedBatch]:
            for batch in batches:
                segments.append(list(batch.segments()))
                sizes.append(batch.num_trained_tokens)
                yield batch

        def place(batch: PackedBatch) -> Edges:
            return Edges.of(batch, device(), dtype=self._dtype)

        def keep(edges: Edges, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
            return logprobs.sum(), logprobs

        kept = self._run(model, noted(), num_microbatches, place, keep, forward_only=True)
        flat = torch.zeros(sum(sizes), dtype=self._dtype, device=device())
        if parallel_state.is_pipeline_last_stage():
            torch.cat(kept, out=flat)
        sum_stages(flat)
        values = [values.cpu().numpy() for values in flat.split(sizes)]
        return list(zip(segments, values, strict=True))

    def _run(
        self,
        model: Any,
        batches: Iterator[PackedBatch],
        num_microbatches: int,
        place: Callable[[PackedBatch], Edges],
        on_logprobs: OnLogprobs,
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """Run Megatron's schedule; what `on_logprobs` kept, on the last pipeline stage, else nothing.

        The gradient that is left is that of the loss summed over all microbatches of all ranks: Megatron divides by a number
        of tokens, and leaves out the division where it is told none. The length it is given is not read, as stages
        tell each other that of every microbatch.
        """
        is_last = parallel_state.is_pipeline_last_stage()

        def finish(edges: Edges, output: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, kept = on_logprobs(edges, output[0], output[1])
            return loss, torch.zeros((), dtype=torch.int, device=output.device), kept

        def forward_step(pending: Iterator[PackedBatch], model: Any) -> Any:
            batch = next(pending)
            edges = place(batch) if is_last else None
            output = model(
                input_ids=torch.from_numpy(batch.input_ids).to(device())[None],
                position_ids=torch.from_numpy(batch.position_ids).to(device())[None],
                attention_mask=torch.from_numpy(batch.end).to(device())[None, None, None],
                edges=edges,
            )
            return output, None if edges is None else partial(finish, edges)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[model],
            num_microbatches=num_microbatches,
            seq_length=self.microbatch_tokens,
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _reduce(kept: Sequence[tuple[Tensor, Tensor]]) -> tuple[dict[str, float], float]:
    """Sums and largest gap over all microbatches of all ranks, the same numbers on every rank."""
    sums = torch.zeros(len(SUMS), dtype=torch.float64, device=device())
    gap_max = torch.zeros(1, dtype=torch.float64, device=device())
    for microbatch_sums, microbatch_gap in kept:
        sums += microbatch_sums
        gap_max = torch.maximum(gap_max, microbatch_gap)
    add_up(sums)
    add_up(gap_max, dist.ReduceOp.MAX)
    return dict(zip(SUMS, sums.tolist(), strict=True)), gap_max.item()
