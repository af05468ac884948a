"""Scorers by name: the built-in ones and a user's own `package.module:function`.

A scorer maps a response and an answer key to an accuracy, 1 for right and 0 for wrong. `reward` turns the
accuracy into the reward that is trained on. The invariant: whatever user code does, `score` returns a float,
NaN where there is no finite accuracy.
"""

import importlib
import logging
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import cast

from treepo_async.errors import ConfigError
from treepo_async.scoring.exact import exact

Scorer = Callable[[str, str], float]
"""From response and answer key to accuracy."""

_BUILT_IN: dict[str, Scorer] = {"exact": exact}

_log = logging.getLogger(__name__)


def get_scorer(name: str) -> Scorer:
    """The scorer of that name.

    Args:
        name: a built-in name, or `package.module:function` for a user's own.

    Raises:
        ConfigError: there is no such scorer, or the user's own cannot be imported.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    if ":" in name:
        return _import_scorer(name)
    close = get_close_matches(name, _BUILT_IN, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(
        f"scorer {name!r} is unknown{hint} Known: {', '.join(sorted(_BUILT_IN))}, "
        "or your own as package.module:function"
    )


def score(scorer: Scorer, response: str, answer: str) -> float:
    """The accuracy a scorer gives, or NaN where it fails; the failure is logged, never raised."""
    try:
        accuracy = float(scorer(response, answer))
    except Exception:  # noqa: BLE001 - user code may raise anything, and one response must not end a run
        _log.warning("scorer %r failed; the response counts as unscored", scorer, exc_info=True)
        return math.nan
    if not math.isfinite(accuracy):
        _log.warning("scorer %r returned %s; the response counts as unscored", scorer, accuracy)
        return math.nan
    return accuracy


def reward(accuracy: float, correct: float, wrong: float) -> float:
    """Linear from `wrong` at accuracy 0 to `correct` at accuracy 1; NaN stays NaN."""
    return accuracy * correct + (1 - accuracy) * wrong


def _import_scorer(name: str) -> Scorer:
    module_name, _, function_name = name.partition(":")
    try:
        scorer = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"scorer {name!r} cannot be imported ({error}); it must be package.module:function, "
            "with the module on the Python path"
        ) from error
    if not callable(scorer):
        raise ConfigError(f"scorer {name!r} is a {type(scorer).__name__}, not a function")
    return cast(Scorer, scorer)
