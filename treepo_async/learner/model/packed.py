"""A GPTModel for a packed forest: rotary embedding by depth, log-probs of the trained tokens instead of logits.

Neighbours: `pack` makes `position_ids` and the trained tokens, `gpt` builds it, `step` calls it. Axis letters: `T` packed
tokens, `E` trained tokens.

Invariant: the output layer sees one row per trained token, and never more than `head_tokens` rows at once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from treepo_async.learner.mcore import GPTModel, tensor_parallel
from treepo_async.learner.model.head import token_logprobs
from treepo_async.learner.packing.edges import Edges

HEAD_TOKENS = 4096


class PackedGPTModel(GPTModel):
    """A GPTModel whose rotary embedding follows `position_ids`; the stock one takes the packed index."""

    def __init__(
        self,
        *args: Any,
        inverse_frequency: Tensor,
        head_tokens: int = HEAD_TOKENS,
        with_entropy_gradient: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build this stage.

        Args:
            args: see Megatron's GPTModel.
            kwargs: see Megatron's GPTModel.
            inverse_frequency: float32 [D / 2], of the rotary embedding, in radians per position.
            head_tokens: trained tokens whose logits are in memory at once.
            with_entropy_gradient: whether the entropies have a gradient.
        """
        # of its own rotary embedding Megatron would compute and keep a table for every length
        super().__init__(*args, position_embedding_type="none", **kwargs)
        # no buffer, which a bfloat16 model would round
        self.inverse_frequency = inverse_frequency
        self.head_tokens = head_tokens
        self.with_entropy_gradient = with_entropy_gradient
        if self.post_process:
            # every tensor-parallel rank is given all rows, and their gradient is added up where they are given
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = False
            self.output_layer.disable_grad_reduce = True

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        *,
        edges: Edges | None,
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: int64 [1, T].
            position_ids: int64 [1, T], depth.
            attention_mask: `end`, int32 [1, 1, 1, T].
            edges: the trained tokens; None before the last stage.

        Returns:
            On the last stage log-probs and entropies of the trained tokens, [2, E], float32 or, of a float64 model, float64;
            before it the hidden states of this rank's tokens, [T / tp or T, 1, hidden].
        """
        hidden = super().forward(input_ids, position_ids, attention_mask)
        return hidden if edges is None else self._score(hidden, edges)

    def _score(self, hidden: Tensor, edges: Edges) -> Tensor:
        """The rows that predict a trained token, through the output layer; [2, E].

        A row whose token branches is there once per child.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
        is_shared = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if is_shared else None
        columns = (hidden.index_select(0, edges.prev), edges.label, edges.temperature)
        chunks = list(zip(*(column.split(self.head_tokens) for column in columns), strict=True))
        if len(chunks) == 1 or not torch.is_grad_enabled():
            return torch.cat([self._score_rows(weight, *chunk) for chunk in chunks], dim=1)
        # the logits of a chunk are computed again in its backward pass; nothing in between is random
        options = {"use_reentrant": False, "preserve_rng_state": False}
        scored = [checkpoint(self._score_rows, weight, *chunk, **options) for chunk in chunks]
        return torch.cat(scored, dim=1)

    def _score_rows(
        self, weight: Tensor | None, rows: Tensor, labels: Tensor, temperature: Tensor
    ) -> Tensor:
        """Log-probs and entropies of some rows, [2, rows]."""
        logits, _ = self.output_layer(rows, weight=weight)
        return token_logprobs(
            logits[:, 0], labels, temperature, with_entropy_gradient=self.with_entropy_gradient
        )

    def _postprocess(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Leave the last hidden states as they are: `_score` takes some of their rows."""
        return hidden_states

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        hidden, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        frequency = self.inverse_frequency
        angle = position_ids.to(frequency.device).t().float()[..., None] * frequency  # [T, 1, D/2]
        return (hidden, torch.cat([angle, angle], dim=-1)[:, :, None, :], *rest)
