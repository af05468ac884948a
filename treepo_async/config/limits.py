"""Limits that follow from the model, or from several knobs and the model."""

from collections.abc import Mapping
from typing import Any

from treepo_async.config.schema import AnyConfig, Config, EngineConfig, LearnerConfig
from treepo_async.errors import ConfigError

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM")
"""Models that can be trained, as `architectures` in config.json names them; Qwen2 and Qwen2.5 share one."""

SPARE_TOKENS = 2
"""SGLang returns two tokens fewer than asked for when prompt and response fill the context exactly."""


def engine_urls(engine: EngineConfig) -> tuple[str, ...]:
    """Of the servers that somebody else runs, as `engine.url` names them; empty where the engines are started here."""
    if engine.url is None:
        return ()
    return tuple(url.strip().rstrip("/") for url in engine.url.split(","))


def check_engine_tp(tp: int, *, on_gpus: bool, otherwise: str = "") -> None:
    """Refuse engines of several processes without GPUs.

    Args:
        tp: of an engine that is started here.
        on_gpus: whether it has GPUs.
        otherwise: another way out, as the message ends.

    Raises:
        ConfigError: it has none.
    """
    if tp > 1 and not on_gpus:
        raise ConfigError(
            f"engine.tp={tp} splits an engine over GPUs, and there are none; give engine.tp=1{otherwise}"
        )


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


NEEDS_PROXIMAL = frozenset({"geometric", "m2po"})
"""Masks that must know the log-ratios of the whole batch first."""


def gap_alarm(config: Config) -> float:
    """Largest log-prob difference of engine and learner that passes without an alarm, in nats."""
    if config.metrics.gap_alarm is not None:
        return config.metrics.gap_alarm
    return {"float32": 1e-4, "bfloat16": 0.5}[config.model.dtype]


def mask_names(text: str) -> list[str]:
    """The masks of `learner.mask`, e.g. `geometric+veto_segment`."""
    return [] if text == "none" else [name.strip() for name in text.split("+")]


def needs_proximal(config: Config) -> bool:
    """Whether the log-probs under the weights at the start of a batch take a forward pass of their own."""
    settings = config.learner
    if settings.proximal != "auto":
        return settings.proximal == "recomputed"
    # of fresh tokens the behavior policy is read as the proximal one
    anchors = is_anchored(settings) and not corrects_fresh(config)
    moves = settings.minibatches > 1 and (reads_proximal(settings) or anchors)
    return moves or settings.value_correction != "none" or needs_bounds(settings)


def needs_bounds(settings: LearnerConfig) -> bool:
    """Whether a mask must know the log-ratios of the whole batch first."""
    return bool(NEEDS_PROXIMAL & set(mask_names(settings.mask)))


def is_anchored(settings: LearnerConfig) -> bool:
    """Whether the ratio of the loss is taken against the policy that sampled; of fresh tokens, that is the proximal one."""
    return settings.anchor == "behavior" or settings.loss == "dppo"


def reads_proximal(settings: LearnerConfig) -> bool:
    """Whether the proximal log-probs of tokens that are not fresh have a say in the loss."""
    in_ratio = settings.loss != "reinforce" and not is_anchored(settings)
    has_masks = bool(mask_names(settings.mask))
    return (
        in_ratio
        or settings.correction != "none"
        or has_masks
        or settings.value_correction != "none"
    )


def corrects_fresh(config: Config) -> bool:
    """Whether tokens sampled under the very version trained from are corrected and masked like others."""
    wanted = config.learner.correct_fresh
    return config.model.dtype == "bfloat16" if wanted is None else wanted
