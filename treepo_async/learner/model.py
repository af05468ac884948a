"""A Megatron GPTModel of a Hugging Face architecture.

Neighbours: `shape` says what is built, `attention` supplies the two modules that know about trees, `hf` fills the
weights, `step` trains it.
"""

import copy

import torch
from torch import Tensor, nn

from treepo_async.learner.attention import TreeAttention
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
from treepo_async.learner.packed_model import PackedGPTModel
from treepo_async.learner.shape import ModelShape, check_split


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm, under sequence parallelism too, where Megatron's wrapper of it refuses to work.

    Each tensor-parallel rank then normalises its own tokens; the mark on the weight makes Megatron add up its gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


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
        calculate_per_token_loss=True,  # that is, not per microbatch: the normalizer is in the weights
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
