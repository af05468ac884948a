"""Scorers by name: the built-in ones and a user's own `package.module:function`.

A scorer maps a response and an answer key to an accuracy, 1 for right and 0 for wrong. `attempt` calls it. The
invariant: whatever it raises or returns, as long as it does so, `attempt` gives an `Attempt`. What a scorer does
beyond that (hang, crash, exit) is contained by `pool`.
"""

import importlib
import math
import struct
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, cast

from treepo_async.errors import ConfigError
from treepo_async.scoring.failures import Attempt, BadKeyError, Failure, failed

Scorer = Callable[[str, str], float]
"""From response and answer key to accuracy."""

BUILT_IN = {
    "exact": "treepo_async.scoring.exact:exact",
    "math": "treepo_async.scoring.maths:maths",
}


def check_name(name: str) -> None:
    """Raise ConfigError unless it is a built-in name or has the form of a user's own; imports nothing."""
    if name in BUILT_IN or ":" in name:
        return
    close = get_close_matches(name, BUILT_IN, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "."
    raise ConfigError(
        f"scorer {name!r} is unknown{hint} Known: {', '.join(sorted(BUILT_IN))}, "
        "or your own as package.module:function"
    )


def get_scorer(name: str) -> Scorer:
    """Import the scorer of that name.

    Args:
        name: a built-in name, or `package.module:function` for a user's own.

    Raises:
        ConfigError: there is no such scorer, or it cannot be imported.
    """
    check_name(name)
    module_name, _, function_name = BUILT_IN.get(name, name).partition(":")
    try:
        scorer = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        way_out = (
            "bash launch/setup.sh installs what it needs"
            if name in BUILT_IN
            else "it must be package.module:function, with the module on the Python path"
        )
        raise ConfigError(
            f"scorer {name!r} cannot be imported ({type(error).__name__}: {error}); {way_out}"
        ) from error
    if not callable(scorer):
        raise ConfigError(f"scorer {name!r} is a {type(scorer).__name__}, not a function")
    return cast(Scorer, scorer)


def attempt(scorer: Scorer, response: str, answer: str) -> Attempt:
    """Call a scorer once; what it raises or returns amiss is in the result, never raised."""
    try:
        returned = scorer(response, answer)
        accuracy = _number(returned)
        if accuracy is None:
            kind = type(returned).__name__
            return failed(
                Failure.NOT_FINITE,
                f"the scorer returned a {kind} for a finite number (float32): {returned!r:.200}",
            )
    except BadKeyError as error:
        return failed(Failure.BAD_KEY, str(error))
    except (Exception, SystemExit):  # noqa: BLE001 - user code may raise anything
        return failed(Failure.RAISED, traceback.format_exc())
    return Attempt(accuracy)


def _number(returned: Any) -> float | None:
    """The number that was returned, a scalar of any library included; None unless it is finite as a float32."""
    if isinstance(returned, str | bytes | bytearray):
        return None
    try:
        number = float(returned)
        # trees hold float32s; raises OverflowError for what is infinite as one of them
        struct.pack("<f", number)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
