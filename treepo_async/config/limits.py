"""Limits that follow from the model, or from several knobs and the model."""

from collections.abc import Mapping
from typing import Any

from treepo_async.config.schema import AnyConfig
from treepo_async.errors import ConfigError

ARCHITECTURES = ("Qwen2ForCausalLM",)
"""Models that can be trained, as `architectures` in config.json names them; Qwen2 and Qwen2.5 share one."""

SPARE_TOKENS = 2
"""SGLang returns two tokens fewer than asked for when prompt and response fill the context exactly."""


def response_limit(config: AnyConfig) -> int:
    """Most response tokens of a trajectory."""
    by_depth = config.tree.segment_tokens * config.tree.max_depth
    return min(by_depth, config.tree.max_response_tokens or by_depth)


def context_length(config: AnyConfig, model: Mapping[str, Any]) -> int:
    """Most tokens of prompt and response together.

    Args:
        config: the run.
        model: the model's `config.json`.

    Raises:
        ConfigError: the model cannot hold the wanted length.
    """
    most = int(model["max_position_embeddings"])
    room = config.data.max_prompt_tokens + response_limit(config) + SPARE_TOKENS
    wanted = config.engine.context_length or min(most, room)
    if wanted > most:
        raise ConfigError(f"engine.context_length={wanted} is above the model's {most} positions")
    pool = config.engine.max_total_tokens
    if pool is not None and pool < wanted:
        raise ConfigError(
            f"engine.max_total_tokens={pool} cannot hold one context of {wanted} tokens; raise it, "
            "or lower engine.context_length"
        )
    if wanted <= response_limit(config) + SPARE_TOKENS:
        raise ConfigError(
            f"responses of up to {response_limit(config)} tokens (tree.segment_tokens * tree.max_depth) leave no "
            f"room for a prompt in {wanted} tokens of context; lower tree.max_depth or tree.max_response_tokens"
        )
    return wanted


def prompt_limit(config: AnyConfig, model: Mapping[str, Any]) -> int:
    """Most prompt tokens: what the context leaves beside a full response."""
    room = context_length(config, model) - response_limit(config) - SPARE_TOKENS
    return min(config.data.max_prompt_tokens, room)
