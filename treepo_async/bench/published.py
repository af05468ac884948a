"""A folder with the config of a model of a published size, without weights: the engine makes some up.

The tokenizer is the tiny one, so prompts are of its few tokens; what is sampled is of the whole vocabulary. Neighbours: `learner_shapes` has the
sizes, `model` writes folders of other sizes with weights. Imports no torch.
"""

import json
from pathlib import Path

from treepo_async.bench.cells import Stop
from treepo_async.bench.learner_shapes import find_shape
from treepo_async.learner.shape import ModelShape
from treepo_async.tiny.tokenizer import EOS_TOKEN_ID, save_tokenizer

DTYPE = "bfloat16"
DTYPE_BYTES = 2
LOAD_FORMAT = "dummy"
"""What SGLang is told of weights that are not there."""


def prepare_published(cache_dir: Path, name: str, stop: Stop) -> Path:
    """The model's folder; written anew, which takes no time and is the same for all who share it.

    Args:
        cache_dir: created if missing.
        name: of a shape.
        stop: without one the model names no end-of-sequence token.

    Raises:
        ConfigError: there is no such shape.
    """
    shape = find_shape(name)
    folder = cache_dir / f"published-{name}-{stop}"
    folder.mkdir(parents=True, exist_ok=True)
    eos = None if stop is Stop.NONE else EOS_TOKEN_ID
    save_tokenizer(folder, shape.max_position_embeddings)
    for file, content in (
        ("config.json", {**hf_config(shape), "eos_token_id": eos}),
        ("generation_config.json", {"eos_token_id": eos}),
    ):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")
    return folder


def hf_config(shape: ModelShape) -> dict[str, object]:
    """`config.json` of a Qwen2 of this shape; `ModelShape.from_config` reads it back."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": DTYPE,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": shape.tied,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def published_cache_bytes(name: str) -> int:
    """Size of an entry of the KV cache: keys and values of every layer."""
    shape = find_shape(name)
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * DTYPE_BYTES
