"""How a tiny model is shaped and taught; plain numbers, so that the cache can name them without torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a Qwen2 decoder small enough to learn on two CPU cores."""

    hidden_size: int = 64
    intermediate_size: int = 192
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 4
    vocab_size: int = 384
    """The tokenizer's 350 ids, padded to a multiple of 128."""
    rope_theta: float = 300.0
    max_position_embeddings: int = 512
    initializer_range: float = 0.04


@dataclass(frozen=True, slots=True)
class Recipe:
    """The supervised warm start: AdamW with a short warm-up and a cosine to a floor.

    The demonstrations are deliberately imperfect: a model that has seen right and hurried ones samples both,
    and reinforcement learning has something to choose from.
    """

    num_steps: int
    p_hurried: float
    """See `task.Task.demonstration`."""
    p_slip: float
    """Likewise."""
    batch_size: int = 32
    learning_rate: float = 3e-3
    min_learning_rate_ratio: float = 0.05
    num_warmup_steps: int = 50
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    num_demonstrations: int = 16_000
    batches_per_bucket: int = 16
    """Batches cut from one draw sorted by length, so that rows of a batch need little padding."""
    num_threads: int = 2


DEFAULT_ARCHITECTURE = Architecture()
