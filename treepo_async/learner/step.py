"""One optimizer update from one batch of trees.

`Learner.train` packs its share of the trees, runs forward and backward over all microbatches through Megatron's schedule, and applies
or skips the update. Neighbours: `pack` plans, `objective` scores, `optimizer` updates, `hf` exports; the worker calls it.

Invariant: the ranks of one data-parallel replica are given the same share, and all ranks return the same result; the
loss is divided by the trajectory tokens of the whole batch, over all replicas.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from treepo_async.errors import ConfigError
from treepo_async.learner.groups import add_up, device, seed_ranks, share
from treepo_async.learner.hf import Read, TensorOf, export, itself, load, open_checkpoint
from treepo_async.learner.logprobs import predicting_logits, token_logprobs
from treepo_async.learner.mcore import get_forward_backward_func, parallel_state
from treepo_async.learner.model import build_model
from treepo_async.learner.objective import SUMS, Edges, LossSettings, Objective
from treepo_async.learner.optimizer import MOMENTS, Optimizer, OptimizerSettings
from treepo_async.learner.pack import (
    Float32,
    Int32,
    PackedBatch,
    edge_values,
    empty_batch,
    pack,
    pack_groups,
    pack_sequences,
)
from treepo_async.learner.shape import ModelShape
from treepo_async.learner.share import Share
from treepo_async.types import PolicyVersion, Tree

WEIGHTS = "weights"
"""The kind of tensors that `Learner.export` gives when not asked for a moment."""

OnLogits = Callable[[Edges, Tensor], tuple[Tensor, Any]]
"""(trained tokens, logits [T, V]) -> (loss [], anything to keep)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one update did. Means and shares are per trajectory token: a token counts once per leaf below it."""

    loss: float
    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    num_trained_tokens: int
    """Each unique token once."""
    num_trajectory_tokens: int
    num_microbatches: int
    """With trained tokens, over all data-parallel replicas."""
    correction_weight_mean: float
    correction_capped_share: float
    clipped_share: float
    kl_behavior: float
    """KL(behavior || learner), k3 estimate in nats."""
    entropy: float
    """In nats, at the sampling temperature."""
    logprob_gap_mean: float
    """Mean |learner - behavior| log-prob over unique tokens sampled under the version trained from with a KV cache of
    one version; NaN where there is none."""
    logprob_gap_max: float
    skipped: bool
    """Whether the weights were left as they were, because the loss or the gradient norm was not finite."""


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
    ) -> None:
        """Put together.

        Args:
            model: from `build_model`.
            shape: of the model.
            optimizer: of the model.
            objective: what is minimised.
            microbatch_tokens: most packed tokens of a microbatch of `logprobs` and `score`.
            align: packed tokens are padded to a multiple of this.
        """
        self.model = model
        self.shape = shape
        self.optimizer = optimizer
        self.objective = objective
        self.microbatch_tokens = microbatch_tokens
        self.align = align

    def train(
        self,
        share: Share,
        *,
        version: PolicyVersion | None = None,
        proximal_logprobs: Sequence[Sequence[Float32]] | None = None,
    ) -> StepResult:
        """Make one update.

        Args:
            share: this replica's, from `share.divide`.
            version: the version the current weights were published as; parity is measured on its tokens.
            proximal_logprobs: centre of the clip range as `logprobs` returns it for the trees of the share, for a
                batch that is trained on more than once; by default the current policy.

        Raises:
            TreeError: a tree and its advantages or log-probs do not fit.
        """
        batches = pack_groups(share.trees, share.advantages, share.microbatches, self.align)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = _edges(batches, version, proximal_logprobs)
        sums, gap_max = _reduce(self._run(microbatches, self._objective_of))
        num_trajectory_tokens = sums["trajectory_tokens"]
        means = {
            name: value / num_trajectory_tokens if num_trajectory_tokens else math.nan
            for name, value in sums.items()
        }
        grad_norm, skipped = self.optimizer.update(finite_loss=math.isfinite(means["loss"]))
        compared = sums["compared"]
        return StepResult(
            loss=means["loss"],
            grad_norm=grad_norm,
            learning_rate=self.optimizer.learning_rate,
            num_trained_tokens=int(sums["trained_tokens"]),
            num_trajectory_tokens=int(num_trajectory_tokens),
            num_microbatches=int(sums["microbatches"]),
            correction_weight_mean=means["weight"],
            correction_capped_share=means["capped"],
            clipped_share=means["clipped"],
            kl_behavior=means["kl_behavior"],
            entropy=means["entropy"],
            logprob_gap_mean=sums["gap"] / compared if compared else math.nan,
            logprob_gap_max=gap_max if compared else math.nan,
            skipped=skipped,
        )

    def logprobs(self, trees: Sequence[Tree]) -> list[list[Float32]]:
        """Log-probs of every sampled token under the current weights, at its tree's temperature.

        Args:
            trees: the same on every rank.

        Returns:
            Per tree and segment `[T]`.
        """
        no_advantages = [np.zeros(len(tree.leaves)) for tree in trees]
        batches = pack(trees, no_advantages, self.microbatch_tokens, self.align)
        found: list[list[Float32]] = [[np.empty(0, np.float32)] * len(t.segments) for t in trees]
        for batch, values in zip(batches, self._logprobs(batches), strict=True):
            for tree, segment, edges in batch.segments():
                found[tree][segment] = values[edges]
        return found

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """Log-probs of each token after the first under the current weights, at temperature 1.

        Args:
            sequences: token ids `[T]` each, at least one token; the same on every rank.

        Returns:
            `[T - 1]` each.
        """
        batches = pack_sequences(sequences, self.microbatch_tokens, self.align)
        found = [np.empty(0, np.float32) for _ in sequences]
        for batch, values in zip(batches, self._logprobs(batches), strict=True):
            for sequence, _, edges in batch.segments():
                found[sequence] = values[edges]
        return found

    def export(self, kind: str = WEIGHTS) -> Iterator[tuple[str, Tensor]]:
        """Yield the HF tensors of the whole model on rank 0; `hf.export` has the terms.

        Args:
            kind: `weights`, or the name of one of the optimizer's `MOMENTS`.
        """
        return export(self.model, self.shape, self._tensor_of(kind))

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

    def _tensor_of(self, kind: str) -> TensorOf:
        return itself if kind == WEIGHTS else self.optimizer.moment(kind)

    def _objective_of(self, edges: Edges, logits_TV: Tensor) -> tuple[Tensor, Any]:
        loss, sums, gap_max = self.objective(edges, logits_TV)
        return loss, (sums, gap_max)

    @torch.no_grad()
    def _logprobs(self, batches: Sequence[PackedBatch]) -> list[Float32]:
        """Log-probs of the trained tokens of each microbatch, `[E]` each, on every rank."""

        def keep(edges: Edges, logits_TV: Tensor) -> tuple[Tensor, Tensor]:
            logits_EV = predicting_logits(logits_TV, edges.prev, edges.temperature)
            values = token_logprobs(logits_EV, edges.label)
            return values.sum(), values

        mine = share(batches, empty_batch(self.align))
        kept = self._run(_edges(mine), keep, forward_only=True)
        sizes = [batch.num_trained_tokens for batch in batches]
        flat = torch.zeros(sum(sizes), device=device())
        views = share(flat.split(sizes), flat[:0])
        if parallel_state.is_pipeline_last_stage():
            for view, values in zip(views, kept, strict=True):
                view.copy_(values)
        add_up(flat)
        return [view.cpu().numpy() for view in flat.split(sizes)]

    def _run(
        self,
        microbatches: Sequence[tuple[PackedBatch, Edges]],
        on_logits: OnLogits,
        *,
        forward_only: bool = False,
    ) -> list[Any]:
        """Run Megatron's schedule; what `on_logits` kept, on the last pipeline stage, else nothing.

        The gradient that is left is that of the summed loss over all ranks, divided by their trajectory tokens.
        """

        def finish(batch: PackedBatch, edges: Edges, logits: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, kept = on_logits(edges, logits[0])
            num_tokens = torch.tensor(
                batch.num_trajectory_tokens, dtype=torch.int, device=logits.device
            )
            return loss, num_tokens, kept

        def forward_step(pending: Iterator[tuple[PackedBatch, Edges]], model: Any) -> Any:
            batch, edges = next(pending)
            logits = model(
                input_ids=torch.from_numpy(batch.input_ids).to(device())[None],
                position_ids=torch.from_numpy(batch.position_ids).to(device())[None],
                attention_mask=torch.from_numpy(batch.end).to(device())[None, None, None],
            )
            return logits, partial(finish, batch, edges)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(microbatches),
            model=[self.model],
            num_microbatches=len(microbatches),
            seq_length=max(batch.num_tokens for batch, _ in microbatches),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def build_learner(
    model_dir: Path,
    *,
    optimizer: OptimizerSettings,
    loss: LossSettings,
    microbatch_tokens: int,
    seed: int,
    sequence_parallel: bool = True,
) -> Learner:
    """Build a learner from a Hugging Face model directory; needs opened process groups.

    Args:
        model_dir: has config.json and safetensors.
        optimizer: what an update does.
        loss: what it minimises.
        microbatch_tokens: most packed tokens of a microbatch; a larger tree gets one of its own.
        seed: of every random generator.
        sequence_parallel: see `build_model`.

    Raises:
        ConfigError: the directory is incomplete, or the model or the correction is not supported.
    """
    objective = Objective(loss)
    path = model_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a Hugging Face model directory")
    shape = ModelShape.from_config(json.loads(path.read_text()))
    seed_ranks(seed)
    model = build_model(shape, sequence_parallel=sequence_parallel)
    load(model, shape, open_checkpoint(model_dir))
    tp = parallel_state.get_tensor_model_parallel_world_size()
    return Learner(
        model,
        shape,
        Optimizer(model, optimizer),
        objective,
        microbatch_tokens,
        align=tp if sequence_parallel else 1,
    )


def _edges(
    batches: Sequence[PackedBatch],
    version: PolicyVersion | None = None,
    proximal_logprobs: Sequence[Sequence[Float32]] | None = None,
) -> list[tuple[PackedBatch, Edges]]:
    """Microbatches with their trained tokens on the device."""
    return [
        (
            batch,
            Edges.of(
                batch,
                device(),
                version,
                None if proximal_logprobs is None else edge_values(batch, proximal_logprobs),
            ),
        )
        for batch in batches
    ]


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
