"""The textbook attention over the forest that an `end` describes, and random inputs of it."""

import math

import numpy as np
import torch

HEADS = ((1, 1), (4, 4), (4, 2), (6, 1))
"""Query heads and key-value heads."""


def visible(end):
    """The mask by the definition, one pair at a time."""
    num_tokens = len(end)
    return np.array(
        [[k <= q < end[k] for k in range(num_tokens)] for q in range(num_tokens)], bool
    ).reshape(num_tokens, num_tokens)


def textbook(query, key, value, sees, scale):
    """softmax(scale Q K^T) V over the visible keys: [1, H, T, D], [1, G, T, D] twice, bool [T, T]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scores = (scale * query @ key.transpose(-1, -2)).masked_fill(~sees, -math.inf)
    return scores.softmax(dim=-1) @ value


def tensors(rng, num_tokens, heads=(4, 2), dim=8, dtype=torch.float64, device="cpu"):
    """Query, key and value as Megatron has them, [T, 1, heads, D], seen as [1, heads, T, D]; leaves of autograd."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    return [
        torch.randn(num_tokens, 1, number, dim, generator=generator, dtype=torch.float64)
        .to(device, dtype)
        .permute(1, 2, 0, 3)
        .requires_grad_()
        for number in (heads[0], heads[1], heads[1])
    ]


def gradients(out, inputs, seed=0):
    """Of a random weighted sum of the output."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return torch.autograd.grad(out, inputs, weight.to(out))
