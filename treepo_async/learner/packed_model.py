"""A GPTModel for a packed forest: rotary embedding by depth, log-probs instead of logits.

Neighbours: `pack` makes `position_ids` and the trained tokens, `model` builds it, `step` calls it.
"""

from typing import Any

import torch
from torch import Tensor

from treepo_async.learner.edges import Edges
from treepo_async.learner.logprobs import predicting_logits, token_entropy, token_logprobs
from treepo_async.learner.mcore import GPTModel


class PackedGPTModel(GPTModel):
    """A GPTModel whose rotary embedding follows `position_ids`; the stock one takes the packed index."""

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor, *, edges: Edges
    ) -> Tensor:
        """Run this stage.

        Args:
            input_ids: int64 [1, T].
            position_ids: int64 [1, T], depth.
            attention_mask: `end`, int32 [1, 1, 1, T].
            edges: the trained tokens.

        Returns:
            On the last stage log-probs and entropies of the trained tokens, float32 [2, E]; before it the hidden states of this
            rank's tokens, [T / tp or T, 1, hidden].
        """
        output = super().forward(input_ids, position_ids, attention_mask)
        if not self.post_process:
            return output
        logits_EV = predicting_logits(output[0], edges.prev, edges.temperature)
        return torch.stack([token_logprobs(logits_EV, edges.label), token_entropy(logits_EV)])

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        hidden, _, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        frequency = self.rotary_pos_emb.inv_freq
        angle = position_ids.to(frequency.device).t().float()[..., None] * frequency  # [T, 1, D/2]
        return (hidden, torch.cat([angle, angle], dim=-1)[:, :, None, :], *rest)
