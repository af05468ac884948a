r"""Finding `\boxed{...}` in a response; pure and linear in the length of the text.

Used by the tree, which ends a path at `boxed_end`, and by `exact`. The invariant: text that grows at its end
never changes a `boxed_end` once there is one, so a path may be cut there while it is still being sampled.
"""

import re
from collections.abc import Iterator

# an escaped backslash is a token of its own, so that the brace behind it still counts
_TOKEN = re.compile(r"\\boxed\{|\\\\(?!boxed\{)|\\[{}]|[{}]")
_OPENING = "\\boxed{"


def boxed_end(text: str) -> int | None:
    r"""Index just past the first complete `\boxed{...}`, or None.

    Braces nest and escaped ones do not count. Of a box inside a box the inner one completes first.
    """
    return next((end for _, end in _boxes(text)), None)


def last_boxed(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that completes last, or None."""
    content = None
    for start, end in _boxes(text):
        content = (start, end - 1)
    return None if content is None else text[slice(*content)]


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Start of the content and index past the closing brace of each box, in order of completion."""
    open_braces: list[int | None] = []
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == _OPENING:
            open_braces.append(match.end())
        elif token == "{":
            open_braces.append(None)
        elif token == "}" and open_braces:
            start = open_braces.pop()
            if start is not None:
                yield start, match.end()
