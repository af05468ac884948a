"""The sizes of a supported model, read from its config.json, and whether a layout fits them; imports no torch.

Neighbours: the driver checks before anything starts, `model` builds, `hf` cuts and joins by it.

Invariant: what the model would compute differently from the checkpoint's own code is refused by name, never ignored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from treepo_async.config.limits import ARCHITECTURES
from treepo_async.errors import ConfigError


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

    @classmethod
    def from_config(cls, hf_config: Mapping[str, Any]) -> Self:
        """Read a model's config.json.

        Raises:
            ConfigError: the architecture or one of its features is not supported, or a key is missing.
        """
        _check_supported(hf_config)
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


def _check_supported(hf_config: Mapping[str, Any]) -> None:
    names = hf_config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ConfigError(
            f"config.json architectures is {names[0]!r}; the learner trains {', '.join(ARCHITECTURES)}"
        )
    rope_kind = _rope(hf_config).get("rope_type", _rope(hf_config).get("type", "default"))
    rope_key = "rope_parameters" if hf_config.get("rope_parameters") else "rope_scaling"
    layer_kinds = set(hf_config.get("layer_types") or ["full_attention"])
    refusals = (
        ("use_sliding_window", bool(hf_config.get("use_sliding_window")), "full attention"),
        ("layer_types", layer_kinds != {"full_attention"}, "full attention"),
        (rope_key, rope_kind != "default", "RoPE without scaling"),
        ("attention_dropout", bool(hf_config.get("attention_dropout")), "no dropout"),
        ("num_experts", bool(hf_config.get("num_experts")), "dense layers"),
        ("hidden_act", hf_config.get("hidden_act", "silu") != "silu", "silu"),
    )
    for key, refused, supported in refusals:
        if refused:
            raise ConfigError(
                f"config.json {key} is {hf_config.get(key)!r}; the learner supports {supported} only"
            )
