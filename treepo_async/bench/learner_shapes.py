"""Models to measure the learner with, by name: published sizes, and one that keeps a CPU core busy with matrices."""

from treepo_async.errors import ConfigError
from treepo_async.learner.shape import ModelShape


def _qwen(
    hidden: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    *,
    head: int = 128,
    tied: bool,
    vocab: int = 151936,
) -> ModelShape:
    return ModelShape(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head,
        rope_theta=1e6,
        norm_epsilon=1e-6,
        max_position_embeddings=32768,
        tied=tied,
        qkv_bias=True,
    )


SHAPES = {
    # the proportions of Qwen2.5-7B: an MLP 5.3 times as wide as the hidden size, one KV head for about 7 query heads
    "cpu": _qwen(512, 2752, 4, 8, 1, head=64, tied=False, vocab=2048),
    "qwen2.5-0.5b": _qwen(896, 4864, 24, 14, 2, head=64, tied=True),
    "qwen2.5-1.5b": _qwen(1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4, tied=False, vocab=152064),
}


def find_shape(name: str) -> ModelShape:
    """The shape of a name, or `LAYERSxHIDDEN` of the proportions of `cpu`.

    Raises:
        ConfigError: the name is unknown, or the hidden size no multiple of 64.
    """
    if name in SHAPES:
        return SHAPES[name]
    layers, x, hidden = name.partition("x")
    if not (x and layers.isdigit() and hidden.isdigit() and int(layers) and int(hidden)):
        raise ConfigError(
            f"shape={name} is unknown; it is one of {', '.join(SHAPES)}, or LAYERSxHIDDEN, e.g. 8x512"
        )
    size = int(hidden)
    if size % 64:
        raise ConfigError(f"shape={name}: the hidden size {size} is no multiple of 64")
    return _qwen(size, size * 43 // 8, int(layers), size // 64, 1, head=64, tied=False, vocab=2048)
