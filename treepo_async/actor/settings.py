"""From the knobs of a run to how its actors grow trees."""

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from treepo_async.actor.expand import ExpandSettings
from treepo_async.config.schema import PruneConfig, TreeConfig
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.client import SamplingSettings
from treepo_async.errors import ConfigError
from treepo_async.scoring.agreement import agreement
from treepo_async.scoring.boxed import boxed_end
from treepo_async.tree.prune import mean_logprob
from treepo_async.tree.rules import GrowthRules, PartialPath, PruneRules, Value
from treepo_async.tree.stopping import StopRules

TOP_LOGPROBS = 20
"""Tokens by which the entropy at a boundary is estimated."""

KEPT_TEXTS = 1024

TextValue = Callable[[str, Sequence[str]], float]
"""From the text of a path so far, and of all paths of its tree, to its value."""

log = logging.getLogger(__name__)


def expand_settings(
    tree: TreeConfig,
    tokenizer: TextTokenizer,
    *,
    prune: PruneConfig | None = None,
    stream_tokens: int = 0,
    max_staleness: int | None = None,
    num_steps: int = 1,
    timeout_s: float = math.inf,
) -> ExpandSettings:
    """How trees are grown.

    Args:
        tree: the section of the config.
        tokenizer: of the model.
        prune: the section of the config; None prunes nothing.
        stream_tokens: requests for more tokens are watched while they run; 0: none is.
        max_staleness: of the run, for `prune.stale`; None where nothing can be stale.
        num_steps: of the run, for `tree.split_temperature_end`.
        timeout_s: of one tree.

    Raises:
        ConfigError: `prune.value` cannot be found.
    """
    top_logprobs = TOP_LOGPROBS if tree.split == "entropy" else 0
    eos_token_ids = tuple(sorted(tokenizer.eos_token_ids))
    return ExpandSettings(
        growth=_growth_rules(tree),
        stops=StopRules(
            eos_token_ids=tokenizer.eos_token_ids,
            decode=tokenizer.decode,
            boxed_end=boxed_end if tree.stop_boxed else None,
            repetition_window=tree.repetition_window,
            repetition_count=tree.repetition_count,
        ),
        sampling=SamplingSettings(tree.temperature, eos_token_ids, top_logprobs),
        prune=PruneRules() if prune is None else _prune_rules(prune, tokenizer, max_staleness),
        stream_tokens=stream_tokens,
        split_temperature_end=tree.split_temperature_end,
        num_steps=num_steps,
        timeout_s=timeout_s,
    )


def path_value(name: str | None, decode: Callable[[Sequence[int]], str]) -> Value | None:
    """The value function that `prune.value` names.

    Raises:
        ConfigError: there is none of that name.
    """
    if name is None:
        return None
    if name == "logprob":
        return mean_logprob
    of_text = agreement if name == "agreement" else _import(name)

    # all paths of a tree are looked at once for each of them
    @lru_cache(maxsize=KEPT_TEXTS)
    def text_of(token_ids: bytes) -> str:
        return decode(np.frombuffer(token_ids, np.int32).tolist())

    def value(path: PartialPath, paths: Sequence[PartialPath]) -> float:
        texts = [text_of(other.token_ids.tobytes()) for other in paths]
        return _contained(name, of_text, text_of(path.token_ids.tobytes()), texts)

    return value


def _growth_rules(tree: TreeConfig) -> GrowthRules:
    return GrowthRules(
        segment_tokens=tree.segment_tokens,
        max_depth=tree.max_depth,
        width=tree.width,
        branching_factor=tree.branching_factor,
        first_fork_min=tree.first_fork_min,
        first_fork_max=tree.first_fork_max,
        fallback=tree.fallback,
        max_response_tokens=tree.max_response_tokens,
        growth=tree.growth,
        split=tree.split,
        split_temperature=tree.split_temperature,
        max_tree_tokens=tree.max_tree_tokens,
    )


def _prune_rules(
    prune: PruneConfig, tokenizer: TextTokenizer, max_staleness: int | None
) -> PruneRules:
    return PruneRules(
        min_logprob=prune.min_logprob,
        value=path_value(prune.value, tokenizer.decode),
        min_value=prune.min_value,
        first_level=prune.first_level,
        probability=prune.probability,
        max_staleness=max_staleness if prune.stale else None,
        refill=prune.refill,
    )


def _contained(name: str, of_text: TextValue, text: str, texts: Sequence[str]) -> float:
    try:
        return float(of_text(text, texts))
    except Exception:
        # user code may raise anything; a path without a value is not pruned
        log.warning("prune.value=%s failed; the path goes on", name, exc_info=True)
        return math.nan


def _import(name: str) -> TextValue:
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ConfigError(
            f"prune.value={name} is not agreement, logprob or package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"prune.value={name} cannot be imported ({error}); it must be package.module:function, "
            "with the module on the Python path"
        ) from error
    if not callable(function):
        raise ConfigError(f"prune.value={name} is a {type(function).__name__}, not a function")
    typed: TextValue = function
    return typed
