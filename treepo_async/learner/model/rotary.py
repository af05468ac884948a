"""The rotary embedding's frequencies, plain and as Llama 3.1 stretches them. Neighbours: `shape` has the constants, `gpt` asks."""

import math

import torch
from torch import Tensor

from treepo_async.learner.shape import ModelShape, RopeStretch


def inverse_frequency(shape: ModelShape, device: torch.device) -> Tensor:
    """Radians per position of each pair of features, float32 [D / 2]; computed in the order Hugging Face does."""
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    frequency = 1.0 / shape.rope_theta**exponent
    if shape.rope_stretch is not None:
        frequency = _stretch(frequency, shape.rope_stretch)
    return frequency.to(device)


def _stretch(frequency: Tensor, stretch: RopeStretch) -> Tensor:
    """Llama 3.1's rule: slow waves are `factor` times slower, fast ones stay, those between go over linearly."""
    turns = stretch.original_positions / (2 * math.pi / frequency)
    share = (turns - stretch.low) / (stretch.high - stretch.low)
    between = (1 - share) * frequency / stretch.factor + share * frequency
    stretched = torch.where(turns < stretch.low, frequency / stretch.factor, between)
    return torch.where(turns > stretch.high, frequency, stretched)
