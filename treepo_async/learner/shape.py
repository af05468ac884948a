"""The sizes of a supported model, read from its config.json, and whether a layout fits them; imports no torch.

Neighbours: the driver checks before anything starts, `model.gpt` builds, `model.hf` cuts and joins by it.

Invariant: what the model would compute differently from the checkpoint's own code is refused by name, never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from treepo_async.config.limits import ARCHITECTURES
from treepo_async.errors import ConfigError

DEFAULT_ROPE, LLAMA3_ROPE = "default", "llama3"


@dataclass(frozen=True, slots=True)
class RopeStretch:
    """How the rotary embedding of Llama 3.1 and later was stretched to longer contexts."""

    factor: float
    low: float
    """Waves with fewer turns than this in the original context are slowed by `factor`."""
    high: float
    """Those with more turns than this are left alone."""
    original_positions: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes and constants of a supported model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    norm_epsilon: float
    max_position_embeddings: int
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether the queries and keys of each head are normalised (Qwen3)."""
    rope_stretch: RopeStretch | None = None
    """None: the rotary embedding is the plain one."""

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> Self:
        """Read a model's config.json.

        Raises:
            ConfigError: the architecture or one of its features is not supported, or a key is missing.
        """
        _check_supported(hf_config)
        family = hf_config["architectures"][0]
        try:
            num_heads, hidden_size = hf_config["num_attention_heads"], hf_config["hidden_size"]
            return cls(
                vocab_size=hf_config["vocab_size"],
                hidden_size=hidden_size,
                intermediate_size=hf_config["intermediate_size"],
                num_layers=hf_config["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=hf_config["num_key_value_heads"],
                head_dim=hf_config.get("head_dim") or hidden_size // num_heads,
                rope_theta=_rope(hf_config).get("rope_theta") or hf_config["rope_theta"],
                norm_epsilon=hf_config["rms_norm_eps"],
                max_position_embeddings=hf_config["max_position_embeddings"],
                tied=hf_config.get("tie_word_embeddings", False),
                qkv_bias=family == "Qwen2ForCausalLM",
                qk_norm=family == "Qwen3ForCausalLM",
                rope_stretch=_stretch(_rope(hf_config)),
            )
        except KeyError as error:
            raise ConfigError(
                f"the model's config.json has no {error}; take the file the model came with"
            ) from error


def check_split(shape: ModelShape, *, tp: int, pp: int) -> None:
    """Refuse a layout over which the model does not split evenly.

    Raises:
        ConfigError: naming the size and the axis.
    """
    for key, size, axis, ranks in (
        ("vocab_size", shape.vocab_size, "tp", tp),
        ("num_attention_heads", shape.num_heads, "tp", tp),
        ("intermediate_size", shape.intermediate_size, "tp", tp),
        ("num_hidden_layers", shape.num_layers, "pp", pp),
    ):
        if size % ranks:
            raise ConfigError(
                f"config.json {key} is {size}, not a multiple of the learner's {axis}={ranks}; "
                f"choose a {axis} that divides it"
            )
    num_qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    if num_qkv % tp:
        raise ConfigError(
            f"config.json has {num_qkv} query, key and value features, not a multiple of the learner's tp={tp}; "
            "choose a tp that divides it"
        )
    # with fewer key-value heads than ranks, several ranks share one
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        raise ConfigError(
            f"config.json num_key_value_heads is {shape.num_kv_heads}, neither a multiple nor a "
            f"divisor of the learner's tp={tp}; choose a tp that divides it or that it divides"
        )


def _rope(hf_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rotary parameters, under the name transformers 5 writes or the one before it."""
    return hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", DEFAULT_ROPE))


def _stretch(rope: Mapping[str, Any]) -> RopeStretch | None:
    if _rope_kind(rope) != LLAMA3_ROPE:
        return None
    return RopeStretch(
        factor=rope["factor"],
        low=rope["low_freq_factor"],
        high=rope["high_freq_factor"],
        original_positions=rope["original_max_position_embeddings"],
    )


def _check_supported(hf_config: Mapping[str, Any]) -> None:
    names = hf_config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ConfigError(
            f"config.json architectures is {names[0]!r}; the learner trains {', '.join(ARCHITECTURES)}"
        )
    rope = _rope(hf_config)
    rope_key = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    known_rope = _rope_kind(rope) in (DEFAULT_ROPE, LLAMA3_ROPE)
    partial = {hf_config.get("partial_rotary_factor"), rope.get("partial_rotary_factor")}
    has_bias = names[0] != "Qwen2ForCausalLM" and bool(hf_config.get("attention_bias"))
    layer_kinds = set(hf_config.get("layer_types") or ["full_attention"])
    refusals = (
        ("use_sliding_window", bool(hf_config.get("use_sliding_window")), "full attention"),
        ("layer_types", layer_kinds != {"full_attention"}, "full attention"),
        (rope_key, not known_rope, f"RoPE of the types {DEFAULT_ROPE} and {LLAMA3_ROPE}"),
        ("partial_rotary_factor", bool(partial - {None, 1}), "RoPE of whole heads"),
        (
            "attention_bias",
            has_bias,
            "attention without biases; Qwen2 has some whatever this key says",
        ),
        ("mlp_bias", bool(hf_config.get("mlp_bias")), "an MLP without biases"),
        ("attention_dropout", bool(hf_config.get("attention_dropout")), "no dropout"),
        ("num_experts", bool(hf_config.get("num_experts")), "dense layers"),
        ("hidden_act", hf_config.get("hidden_act", "silu") != "silu", "silu"),
    )
    for key, refused, supported in refusals:
        if refused:
            raise ConfigError(
                f"config.json {key} is {hf_config.get(key, rope.get(key))!r}; the learner supports {supported} only"
            )
