"""A Megatron GPTModel of a Hugging Face architecture.

Neighbours: `attention` supplies the two modules that know about trees, `hf` fills the weights, `step` trains it.

Invariant: what the model would compute differently from the checkpoint's own code is refused by name, never ignored.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from treepo_async.config.limits import ARCHITECTURES
from treepo_async.errors import ConfigError
from treepo_async.learner.attention import PackedGPTModel, TreeAttention
from treepo_async.learner.groups import device
from treepo_async.learner.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    TransformerBlockSubmodules,
    TransformerConfig,
    finalize_model_grads,
    get_gpt_layer_local_spec,
    get_num_layers_to_build,
    parallel_state,
)


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


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm, under sequence parallelism too, where Megatron's wrapper of it refuses to work.

    Each tensor-parallel rank then normalises its own tokens; the mark on the weight makes Megatron add up its gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


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
    # with fewer key-value heads than ranks, several ranks share one
    if shape.num_kv_heads % tp and tp % shape.num_kv_heads:
        raise ConfigError(
            f"config.json num_key_value_heads is {shape.num_kv_heads}, neither a multiple nor a "
            f"divisor of the learner's tp={tp}; choose a tp that divides it or that it divides"
        )


def build_model(shape: ModelShape, *, sequence_parallel: bool) -> DistributedDataParallel:
    """Build this rank's share of the model, in float32, weights still unset, gradients reduced over dp.

    Needs opened process groups.

    Args:
        shape: of the whole model.
        sequence_parallel: whether tensor-parallel ranks also divide, by tokens, what lies between attention and MLP;
            packed lengths must then be multiples of tp. Nothing changes with tp=1.

    Raises:
        ConfigError: the model does not split evenly over the ranks.
    """
    tp = parallel_state.get_tensor_model_parallel_world_size()
    check_split(shape, tp=tp, pp=parallel_state.get_pipeline_model_parallel_world_size())
    config = _transformer_config(shape, sequence_parallel=sequence_parallel and tp > 1)
    model = PackedGPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    ).to(device())
    return DistributedDataParallel(config, DistributedDataParallelConfig(), model)


def _transformer_config(shape: ModelShape, *, sequence_parallel: bool) -> TransformerConfig:
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
        # every weight comes from a checkpoint; switching initialisation off would also leave out the
        # attributes that mark a parameter as sharded
        init_method=_leave,
        output_layer_init_method=_leave,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # demanded with variable lengths, of dense models too
        cuda_graph_scope=[],
        calculate_per_token_loss=True,  # the gradient is divided by the batch's trajectory tokens
        finalize_model_grads_func=finalize_model_grads,
        **_without_kernels(),
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _without_kernels() -> dict[str, bool]:
    """Switches for a build without apex, Transformer Engine and, on CPU, without CUDA."""
    return {
        "use_cpu_initialization": not torch.cuda.is_available(),
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
    }


def _layer_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    spec = copy.deepcopy(get_gpt_layer_local_spec(normalization="RMSNorm"))
    spec.submodules.self_attention.submodules.core_attention = TreeAttention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm
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
