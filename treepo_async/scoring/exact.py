r"""Exact answers: the last box of a response, else its last `#### x` line, against the answer key.

Pure, and safe on hostile text: nothing here raises, and the time is linear in the length of the text,
because only short texts are ever read as numbers.
"""

import re
from fractions import Fraction

from treepo_async.scoring.boxed import last_boxed

_MAX_ANSWER_CHARS = 1000
"""A longer answer is compared as it stands."""
_MAX_EXPONENT = 1000

_HASHES = "####"
_SPACING = re.compile(r"\\[,;:! ]|\\q?quad\b|\s+|~")
_DROPPED = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\?\$|\\?%")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
_DECIMAL = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?")
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?P<numerator>{_DECIMAL})"
    rf"(?:[eE](?P<exponent>[-+]?[0-9]{{1,5}})|/(?P<denominator>[-+]?{_DECIMAL}))?"
)
_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)\\[dt]?frac(?:\{{(?P<top>[-+]?{_DECIMAL})\}}\{{(?P<bottom>[-+]?{_DECIMAL})\}}"
    r"|(?P<top_digit>[0-9])(?P<bottom_digit>[0-9]))"
)


def exact(response: str, answer: str) -> float:
    r"""Compare the final answer of a response with the answer key.

    Args:
        response: any text; its final answer is the last complete `\boxed{...}`, else what stands behind
            `####` on the last line that begins with it.
        answer: the key, either bare or itself a worked solution with such a final answer.

    Returns:
        1.0 where both are the same number or, after normalisation, the same text; otherwise 0.0. A response
        without a final answer is wrong.
    """
    given = final_answer(response)
    if given is None:
        return 0.0
    expected = final_answer(answer)
    return float(same(given, answer if expected is None else expected))


def final_answer(text: str) -> str | None:
    """The final answer in a text as it stands there, or None."""
    boxed = last_boxed(text)
    return _last_hashes(text) if boxed is None else boxed


def same(given: str, expected: str) -> bool:
    """Whether two answers are equal as numbers, or else as normalised text."""
    given, expected = normalised(given), normalised(expected)
    if given == expected:
        return given != ""
    given_value = number(given)
    return given_value is not None and given_value == number(expected)


def normalised(answer: str) -> str:
    r"""An answer without spaces, dollar and per cent signs, `\text{}`, thousands commas and a final period."""
    answer = answer.strip()
    if len(answer) > _MAX_ANSWER_CHARS:
        return answer
    answer = _TEXT.sub(r"\1", answer)
    answer = _DROPPED.sub("", _SPACING.sub("", answer))
    answer = answer.replace("{,}", ",").replace("−", "-").removesuffix(".")
    if _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "")
    return answer


def number(answer: str) -> Fraction | None:
    r"""The exact value of a normalised integer, decimal, `a/b`, `\frac{a}{b}` or `1.5e3`, or None."""
    if len(answer) > _MAX_ANSWER_CHARS:
        return None
    if match := _NUMBER.fullmatch(answer):
        exponent = int(match["exponent"] or 0)
        if abs(exponent) > _MAX_EXPONENT:
            return None
        top, bottom = Fraction(match["numerator"]), Fraction(match["denominator"] or 1)
        top *= Fraction(10) ** exponent
    elif match := _FRACTION.fullmatch(answer):
        top = Fraction(match["top"] or match["top_digit"])
        bottom = Fraction(match["bottom"] or match["bottom_digit"])
    else:
        return None
    if bottom == 0:
        return None
    return -top / bottom if match["sign"] == "-" else top / bottom


def _last_hashes(text: str) -> str | None:
    """What follows `####` on the last line that begins with it."""
    end = len(text)
    while (at := text.rfind(_HASHES, 0, end)) != -1:
        line_start = text.rfind("\n", 0, at) + 1
        if not text[line_start:at].strip(" \t#"):
            line_end = text.find("\n", at)
            line = text[at:] if line_end == -1 else text[at:line_end]
            return line.lstrip("#").strip()
        end = line_start
    return None
