"""The tiny model, written out: a Qwen2 decoder whose parameter names and arithmetic are Hugging Face's.

`warm_start` trains it and `save_model` writes a folder that SGLang, Megatron-Core and transformers load as
`Qwen2ForCausalLM`. The invariant, checked against transformers by a test: the saved folder gives the same
logits there. Shapes: B rows, T tokens, D hidden size, H heads, K KV heads, V vocabulary.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from treepo_async.tiny.recipe import Architecture
from treepo_async.tiny.tokenizer import EOS_TOKEN_ID

_RMS_NORM_EPS = 1e-6


class _Attention(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.head_dim = a.hidden_size // a.num_heads
        self.q_proj = nn.Linear(a.hidden_size, a.num_heads * self.head_dim)
        self.k_proj = nn.Linear(a.hidden_size, a.num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(a.hidden_size, a.num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(a.num_heads * self.head_dim, a.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention over `hidden` [B, T, D] with rotary tables [T, head_dim]."""
        heads = (*hidden.shape[:2], -1, self.head_dim)
        query = _rotate(self.q_proj(hidden).view(heads).transpose(1, 2), cos, sin)
        key = _rotate(self.k_proj(hidden).view(heads).transpose(1, 2), cos, sin)
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(a.hidden_size, a.intermediate_size, bias=False)
        self.up_proj = nn.Linear(a.hidden_size, a.intermediate_size, bias=False)
        self.down_proj = nn.Linear(a.intermediate_size, a.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class _Layer(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(a.hidden_size, _RMS_NORM_EPS)
        self.self_attn = _Attention(a)
        self.post_attention_layernorm = nn.RMSNorm(a.hidden_size, _RMS_NORM_EPS)
        self.mlp = _Mlp(a)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Decoder(nn.Module):
    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(a.vocab_size, a.hidden_size)
        self.layers = nn.ModuleList(_Layer(a) for _ in range(a.num_layers))
        self.norm = nn.RMSNorm(a.hidden_size, _RMS_NORM_EPS)


class TinyQwen2(nn.Module):
    """The decoder with tied embeddings, float32, on the CPU.

    Args:
        architecture: its shape.
        seed: decides the initial weights; torch's global random state is left as it was found.
    """

    def __init__(self, architecture: Architecture, seed: int) -> None:
        super().__init__()
        # a nested module, so that parameter names begin with `model.` as in transformers
        with torch.random.fork_rng(devices=[]):
            self.model = _Decoder(architecture)
        cos, sin = _rotary_tables(architecture)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(architecture.initializer_range, torch.Generator().manual_seed(seed))

    def _initialise(self, std: float, generator: torch.Generator) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, token_ids: Tensor) -> Tensor:
        """Final hidden states [B, T, D] of token ids [B, T]; padding belongs at the right end."""
        num_tokens = token_ids.shape[1]
        hidden = self.model.embed_tokens(token_ids)
        for layer in self.model.layers:
            hidden = layer(hidden, self.cos[:num_tokens], self.sin[:num_tokens])
        return self.model.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return F.linear(hidden, self.model.embed_tokens.weight)


def save_model(model: TinyQwen2, architecture: Architecture, folder: Path) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` into an existing folder."""
    tensors = {name: t.detach().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), EOS_TOKEN_ID)
    for name, content in (
        ("config.json", {**_config(architecture), **special}),
        ("generation_config.json", special),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _config(architecture: Architecture) -> dict[str, object]:
    """What `Qwen2Config.save_pretrained` writes for this architecture."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "dtype": "float32",
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "initializer_range": architecture.initializer_range,
        "intermediate_size": architecture.intermediate_size,
        "layer_types": ["full_attention"] * architecture.num_layers,
        "max_position_embeddings": architecture.max_position_embeddings,
        "max_window_layers": architecture.num_layers,
        "model_type": "qwen2",
        "num_attention_heads": architecture.num_heads,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.num_kv_heads,
        "rms_norm_eps": _RMS_NORM_EPS,
        "rope_parameters": {"rope_theta": architecture.rope_theta, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": architecture.vocab_size,
    }


def _rotary_tables(architecture: Architecture) -> tuple[Tensor, Tensor]:
    """Cosines and sines [max_position_embeddings, head_dim] (RoFormer, section 3.2.2)."""
    head_dim = architecture.hidden_size // architecture.num_heads
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    positions = torch.arange(architecture.max_position_embeddings).float()
    angles = torch.outer(positions, architecture.rope_theta**-exponents)
    both_halves = torch.cat([angles, angles], dim=-1)
    return both_halves.cos(), both_halves.sin()


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `heads` [B, H, T, head_dim], pairing dimension i with i + head_dim / 2."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
