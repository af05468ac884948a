"""When a path ends: the first token of a run that completes a stop.

The token that completes a stop is the path's last; what the engine decoded behind it is cut, so that leaves
do not depend on how far a request ran on. An end-of-sequence token right behind a box is kept where it lies in the
box's own segment: it costs nothing and teaches the model to end there.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from treepo_async.types import StopReason

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_OF_A_CHARACTER = 3
"""Bytes of one that is not whole."""


@dataclass(frozen=True, slots=True)
class StopRules:
    """What ends a path besides the response limit."""

    eos_token_ids: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    boxed_end: Callable[[str], int | None] | None = None
    """Index just past the first complete box of a text, or None; None here: boxes do not end a path."""
    repetition_window: int = 32
    repetition_count: int = 0
    """A window of that many characters seen this often ends the path, see `_find_repetition`; 0: never."""


def find_stop(
    rules: StopRules,
    context: Sequence[int],
    token_ids: Sequence[int],
    *,
    segment_tokens: int,
) -> tuple[int, StopReason] | None:
    """The earliest stop in a run.

    Args:
        rules: what ends a path.
        context: all response tokens before the run, where a box or a repetition that the run completes may have begun.
        token_ids: the run, [T].
        segment_tokens: the grid.

    Returns:
        How many tokens of the run stay (1..T), and why; None if nothing in it ends the path.
    """
    stops = [
        _find_eos(rules, token_ids),
        _find_boxed(rules, context, token_ids),
        _find_repetition(rules, context, token_ids),
    ]
    stop = min((s for s in stops if s is not None), key=lambda stop: stop[0], default=None)
    if stop is None:
        return None
    kept, reason = stop
    same_segment = (len(context) + kept) % segment_tokens != 0
    if reason is StopReason.BOXED and same_segment and _find_eos(rules, token_ids[kept : kept + 1]):
        return kept + 1, StopReason.EOS
    return stop


def _find_eos(rules: StopRules, token_ids: Sequence[int]) -> tuple[int, StopReason] | None:
    for i, token in enumerate(token_ids):
        if token in rules.eos_token_ids:
            return i + 1, StopReason.EOS
    return None


def _find_boxed(
    rules: StopRules, context: Sequence[int], token_ids: Sequence[int]
) -> tuple[int, StopReason] | None:
    boxed_end, before = rules.boxed_end, list(context)
    if boxed_end is None:
        return None
    kept = _first(token_ids, lambda head: boxed_end(rules.decode(before + list(head))) is not None)
    return None if kept is None else (kept, StopReason.BOXED)


def _find_repetition(
    rules: StopRules, context: Sequence[int], token_ids: Sequence[int]
) -> tuple[int, StopReason] | None:
    """Where the last tokens of the path repeat themselves, as many as a window takes, repeated, at a character each.

    They are counted in blocks of that many tokens from the prompt on, the one before included: so what is found depends
    neither on where requests or segments end, nor on how much of the path there is.
    """
    path, span = [*context, *token_ids], rules.repetition_window * rules.repetition_count
    if span == 0:
        return None
    seen = len(context)
    while seen < len(path):
        block = seen // span
        before = path[max(0, (block - 1) * span) : seen]
        kept = _first(path[seen : (block + 1) * span], partial(_repeats, rules, before))
        if kept is not None:
            return seen - len(context) + kept, StopReason.REPETITION
        seen = (block + 1) * span
    return None


def _repeats(rules: StopRules, before: Sequence[int], head: Sequence[int]) -> bool:
    text = rules.decode([*before, *head])
    # at both ends there may be bytes of a character that is not whole
    for _ in range(MOST_OF_A_CHARACTER):
        text = text.removeprefix(REPLACEMENT).removesuffix(REPLACEMENT)
    return is_repetitive(text, rules.repetition_window, rules.repetition_count)


def is_repetitive(text: str, window: int, count: int) -> bool:
    """Whether some `window` characters occur at least `count` times in `text`, overlaps included."""
    if len(text) < window + count - 1:
        return False
    windows = Counter(text[i : i + window] for i in range(len(text) - window + 1))
    return max(windows.values()) >= count


def _first(token_ids: Sequence[int], holds: Callable[[Sequence[int]], bool]) -> int | None:
    """Length of the shortest head for which `holds`, given that it goes on holding; None if it never does."""
    if not holds(token_ids):
        return None
    return 1 + bisect_left(
        range(1, len(token_ids)), True, key=lambda length: holds(token_ids[:length])
    )
