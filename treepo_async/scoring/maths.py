r"""Mathematical answers: math-verify decides whether the final answer of a response equals the answer key.

math-verify is slow and may hang (`\boxed{9^{9^{9^9}}}`), and its own timeouts need a main thread: they are off here,
so this runs only in a process that can be killed, see `pool`.

A response that cannot be read is wrong. A key that cannot be read, and a comparison that raises, are reward errors:
nobody knows then whether the response is right.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import parse, verify
from sympy import Basic, MatrixBase, nan, zoo

from treepo_async.scoring.exact import final_answer, same
from treepo_async.scoring.failures import BadKeyError

# it warns at every start that its timeouts are off
logging.getLogger("math_verify").setLevel(logging.ERROR)

_BOX = r"\boxed{%s}"
"""What stands in it is read as one formula; of bare text math-verify may take a part, e.g. a number."""


def maths(response: str, answer: str) -> float:
    r"""Compare the final answer of a response with the answer key, as mathematics.

    Args:
        response: any text; its final answer is the last complete `\boxed{...}`, else the last line that begins with
            `####`, else what math-verify finds, e.g. the last formula or number.
        answer: the key, bare or a worked solution with such a final answer.

    Returns:
        1.0 where both are the same text or the same for math-verify, otherwise 0.0.

    Raises:
        BadKeyError: the key is no mathematics that math-verify can read.
        Exception: whatever a comparison raises.
    """
    key_text, key = _key(answer)
    given = final_answer(response)
    if given is not None and same(given, key_text):
        return 1.0
    return float(_equal(key, _readings(response if given is None else _BOX % given)))


@lru_cache(maxsize=64)
def _key(answer: str) -> tuple[str, tuple[Any, ...]]:
    """The key's final answer, and its readings; cached because all responses of a tree share it."""
    text = final_answer(answer)
    text = answer if text is None else text
    readings = _readings(_BOX % text)
    if not any(_is_known(reading) for reading in readings):
        raise BadKeyError(
            f"answer key {answer!r:.200} cannot be read as mathematics; repair or delete the record, or "
            "compare texts with reward.scorer=exact"
        )
    return text, readings


def _readings(text: str) -> tuple[Any, ...]:
    """The final answer in a text as math-verify reads it: an expression, the text, both, or nothing."""
    try:
        return tuple(parse(text, parsing_timeout=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - what its parser raises on text that is no mathematics is not documented
        return ()


def _is_known(reading: Any) -> bool:
    return isinstance(reading, Basic | MatrixBase) and reading not in (nan, zoo)


def _equal(key: Sequence[Any], given: Sequence[Any]) -> bool:
    """Whether any two readings are equal; a comparison that raises counts only if no other says yes."""
    failure: Exception | None = None
    for expected in key:
        for found in given:
            try:
                if verify(expected, found, timeout_seconds=None, raise_on_error=True):
                    return True
            except Exception as error:  # noqa: BLE001 - what it raises is not documented
                failure = error
    if failure is not None:
        raise failure
    return False
