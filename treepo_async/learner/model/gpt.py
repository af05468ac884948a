"""A Megatron GPTModel of a Hugging Face architecture.

Neighbours: `shape` says what is built, `attention` has the module that knows about trees, `hf` fills the weights, `step`
trains it.

Where Transformer Engine is installed beside CUDA its layers are used, with the tree's attention in the place of its own. That has
never run on a GPU; what is tested without one is the map of the parameters' names.
"""

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from treepo_async.learner.attention.module import core_attention
from treepo_async.learner.groups import device
from treepo_async.learner.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    ModuleSpec,
    TransformerBlockSubmodules,
    TransformerConfig,
    finalize_model_grads,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    parallel_state,
)
from treepo_async.learner.model.packed import HEAD_TOKENS, PackedGPTModel
from treepo_async.learner.model.rotary import inverse_frequency
from treepo_async.learner.shape import ModelShape, check_split

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
"""What Megatron is told for each choice of `learner.recompute`."""


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm, under sequence parallelism too, where Megatron's wrapper of it refuses to work.

    Each tensor-parallel rank then normalises its own tokens; the mark on the weight makes Megatron add up its gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How a model is computed; none of it changes which function it is."""

    sequence_parallel: bool = True
    """Whether tensor-parallel ranks also divide, by tokens, what lies between attention and MLP; packed lengths must then be
    multiples of tp. Nothing changes with tp=1."""
    dtype: torch.dtype = torch.float32
    """Of weights and activations. With bfloat16 gradients are added up and reduced in float32."""
    attention: str = "auto"
    """One of `config.schema.ATTENTIONS`."""
    recompute: str = "none"
    """A name in `RECOMPUTE`."""
    head_tokens: int = HEAD_TOKENS
    """Trained tokens whose logits are in memory at once."""
    with_entropy_gradient: bool = False
    """Whether the entropies have a gradient."""


def build_model(
    shape: ModelShape, settings: ModelSettings = ModelSettings()
) -> DistributedDataParallel:
    """Build this rank's share of the model, weights still unset, gradients reduced over dp.

    Needs opened process groups.

    Args:
        shape: of the whole model.
        settings: how it is computed.

    Raises:
        ConfigError: the model does not split evenly over the ranks, or the attention's backend does not run here.
    """
    model = build_frozen(shape, settings)
    # in bfloat16 a sum over microbatches would lose what each adds
    in_float32 = settings.dtype == torch.bfloat16
    reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=in_float32)
    return DistributedDataParallel(model.config, reduction, model.requires_grad_(True))


def build_frozen(shape: ModelShape, settings: ModelSettings) -> Any:
    """`build_model`, for log-probs alone: without gradients and the buffers they are reduced in."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    check_split(shape, tp=tp, pp=pp)
    config = _transformer_config(shape, settings)
    model = PackedGPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(
            config, core_attention(settings.attention, num_stages=pp)
        ),
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=shape.tied,
        inverse_frequency=inverse_frequency(shape, device()),
        head_tokens=settings.head_tokens,
        with_entropy_gradient=settings.with_entropy_gradient,
    ).to(device())
    model.requires_grad_(False)
    return Float16Module(config, model) if config.bf16 else model


def _transformer_config(shape: ModelShape, settings: ModelSettings) -> TransformerConfig:
    tp = parallel_state.get_tensor_model_parallel_world_size()
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
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=settings.dtype == torch.bfloat16,
        params_dtype=settings.dtype,
        pipeline_dtype=settings.dtype,
        # every weight comes from a checkpoint; switching initialisation off would also leave out the
        # attributes that mark a parameter as sharded
        init_method=_leave,
        output_layer_init_method=_leave,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        sequence_parallel=settings.sequence_parallel and tp > 1,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # demanded with variable lengths, of dense models too
        cuda_graph_scope=[],
        calculate_per_token_loss=True,  # that is, not per microbatch: the normalizer is in the weights
        finalize_model_grads_func=finalize_model_grads,
        **RECOMPUTE[settings.recompute],
        **_without_kernels(),
    )


def _leave(weight: Tensor) -> Tensor:
    return weight


def _without_kernels() -> dict[str, bool]:
    """Switches for a build without apex and, on CPU, without CUDA and a compiler."""
    with_cuda = torch.cuda.is_available()
    return {
        "use_cpu_initialization": not with_cuda,
        "masked_softmax_fusion": False,
        # torch compiles it: the gated unit is one kernel forward and one backward
        "bias_activation_fusion": with_cuda,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "cross_entropy_loss_fusion": False,
    }


def has_transformer_engine() -> bool:
    """Whether the layers are Transformer Engine's."""
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def _layer_spec(
    config: TransformerConfig, attention: ModuleSpec
) -> TransformerBlockSubmodules | ModuleSpec:
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        spec.submodules.self_attention.submodules.core_attention = attention
        # of a layer, Megatron makes a block whose last norm is Transformer Engine's too
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    spec = copy.deepcopy(spec)
    parts = spec.submodules.self_attention.submodules
    parts.core_attention = attention
    if config.qk_layernorm:
        parts.q_layernorm = parts.k_layernorm = RMSNorm
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[spec] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )
