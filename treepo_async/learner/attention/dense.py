"""Tree attention with a mask of all pairs: on any device, in any precision, quadratic in memory. The oracle of the others.

Neighbour: `plan` chooses the backend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def visibility(end: Tensor) -> Tensor:
    """The mask of a forest, bool `[T, T]`: query `q` sees key `k` exactly when `k <= q < end[k]`.

    Args:
        end: int32 [T].
    """
    index = torch.arange(len(end), device=end.device)
    return (index[None, :] <= index[:, None]) & (index[:, None] < end[None, :])


class DensePlan:
    """Attention over the forest that `end` describes, int32 [T]."""

    def __init__(self, end: Tensor) -> None:
        self.mask = visibility(end)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend; see `plan.Plan`."""
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, scale=scale, enable_gqa=True
        )
