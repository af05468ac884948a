r"""How many paths of a tree lean towards the same answer; pure.

Neighbour: `exact`, whose equality of answers it uses. A response that is not complete has a partial answer as well: its
last box, else the last number that it has written to the end.
"""

import math
import re
from collections.abc import Sequence

from treepo_async.scoring.exact import final_answer, same

_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)*")


def agreement(response: str, responses: Sequence[str]) -> float:
    """Share of the responses that have the partial answer of this one.

    Args:
        response: so far.
        responses: of all paths, this one included; those without a partial answer do not count.

    Returns:
        Above 0 and at most 1, or NaN where this response has no partial answer.
    """
    answer = partial_answer(response)
    if answer is None:
        return math.nan
    answers = [found for found in map(partial_answer, responses) if found is not None]
    return sum(same(answer, other) for other in answers) / len(answers)


def partial_answer(response: str) -> str | None:
    """The last box, `#### x` line or whole number of a response, or None."""
    final = final_answer(response)
    if final is not None:
        return final
    numbers = [found for found in _NUMBER.finditer(response) if _is_whole(response, found.end())]
    return numbers[-1].group() if numbers else None


def _is_whole(response: str, end: int) -> bool:
    """Whether no next token can go on with the number that ends there: neither a digit nor a point and a digit."""
    behind = end
    while behind < len(response) and response[behind] in ".,":
        behind += 1
    return behind < len(response) or behind - end > 1
