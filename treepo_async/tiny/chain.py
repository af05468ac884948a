r"""A chain of distances, one line each: the task `tiny`, an implementation of `task.Task`.

`a#b` is the distance of a and b. Taken from left to right, `6#2#7` is worked as

    (1) 6#2=4
    (2) 4#7=3
    \boxed{3}

Every line is a choice between the distance and the sum, and a single wrong choice makes the answer wrong: unlike in
`precedence`, the deciding choices lie all along the response. Demonstrations are tempted to take the sum where the
second number is large, so a warm-started model does it mostly, and its greedy answers there are wrong.
The invariant: a right line is `LINE_TOKENS` tokens long, so with segments of that length a tree forks between lines.
"""

import random
from dataclasses import dataclass

from treepo_async.tiny.recipe import Recipe
from treepo_async.tiny.task import Demonstration, Problem, is_heldout, stream

MIN_OPERATIONS = 4
MAX_OPERATIONS = 6
LINE_TOKENS = 10
"""Of `(1) 6#2=4` and the line's end; numbers of two digits, which hurried lines have, are single tokens too."""

TEMPTING = 9
"""A line whose second number is at least this may be hurried; there is one or more in three of five chains."""

RECIPE = Recipe(num_steps=800, p_hurried=0.75, p_slip=0.01)
"""After it, about half of the sampled answers are right."""

_DIGITS = range(1, 10)
_SLIPS = (-2, -1, 1, 2)


@dataclass(frozen=True, slots=True)
class _Chain:
    """Numbers joined by `#`, as far as they are drawn."""

    numbers: tuple[int, ...]
    value: int
    wrong_values: frozenset[int] = frozenset()
    """What hurried choices, one or several, make of it."""

    def __str__(self) -> str:
        return "#".join(str(number) for number in self.numbers)

    def followed_by(self, number: int) -> "_Chain":
        """The chain with one number more."""
        wrong_values = {f(wrong, number) for wrong in self.wrong_values for f in (_distance, _sum)}
        return _Chain(
            (*self.numbers, number),
            _distance(self.value, number),
            frozenset(wrong_values | {_sum(self.value, number)}),
        )

    def is_decided(self) -> bool:
        """Whether only right choices give the value, and the next line is a choice again."""
        return 0 < self.value not in self.wrong_values


def problem(seed: int, index: int, heldout: bool) -> Problem:
    """See `task.Task`: a chain such as `6#2#7#9#4` that only right choices all along answer."""
    chain = _draw(stream(seed, index, heldout), heldout)
    return Problem(str(chain), str(chain.value))


def demonstration(seed: int, index: int, *, p_hurried: float, p_slip: float) -> Demonstration:
    """See `task.Task`.

    Args:
        seed: names the stream.
        index: position in it.
        p_hurried: chance that a tempting line takes the sum, drawn for each one on its own.
        p_slip: chance of an arithmetic slip, per line.
    """
    rng = random.Random(f"demonstration/{seed}/{index}")
    chain = _draw(rng, heldout=False)
    response = _work(rng, chain, p_hurried, p_slip)
    return Demonstration(Problem(str(chain), str(chain.value)), response)


def _draw(rng: random.Random, heldout: bool) -> _Chain:
    """A chain of the split in which every choice decides."""
    # the length once and for all, as long chains are refused more often
    num_operations = rng.randint(MIN_OPERATIONS, MAX_OPERATIONS)
    while True:
        first = rng.choice(_DIGITS)
        chain = _lengthen(rng, _Chain((first,), first), num_operations)
        if chain is not None and is_heldout(str(chain)) == heldout:
            return chain


def _lengthen(rng: random.Random, chain: _Chain, num_operations: int) -> _Chain | None:
    """The chain after so many operations, decided after each; None where it came to a dead end."""
    for _ in range(num_operations):
        longer = (chain.followed_by(number) for number in rng.sample(_DIGITS, len(_DIGITS)))
        decided = next((each for each in longer if each.is_decided()), None)
        if decided is None:
            return None
        chain = decided
    return chain


def _work(rng: random.Random, chain: _Chain, p_hurried: float, p_slip: float) -> str:
    """The response, line by line."""
    value, lines = chain.numbers[0], []
    for number, operand in enumerate(chain.numbers[1:], start=1):
        is_hurried = operand >= TEMPTING and rng.random() < p_hurried
        result = _sum(value, operand) if is_hurried else _distance(value, operand)
        if rng.random() < p_slip:
            result = max(0, result + rng.choice(_SLIPS))
        lines.append(f"({number}) {value}#{operand}={result}")
        value = result
    lines.append(f"\\boxed{{{value}}}")
    return "\n".join(lines)


def _distance(a: int, b: int) -> int:
    return abs(a - b)


def _sum(a: int, b: int) -> int:
    return a + b
