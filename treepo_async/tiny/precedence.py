"""Precedence arithmetic, one operation per line: the task `tiny-precedence`, an implementation of `task.Task`.

Multiply first, or read strictly left to right: the choice that decides the answer is the response's first one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from treepo_async.tiny.recipe import Recipe
from treepo_async.tiny.task import Demonstration, Problem, is_heldout, stream

MIN_OPERANDS = 4
MAX_OPERANDS = 6
MAX_DIGIT = 9
MAX_VALUE = 39
"""Every intermediate value lies in 0..MAX_VALUE, in both reading orders."""
MAX_PRODUCTS = 2

RECIPE = Recipe(num_steps=1500, p_hurried=0.42, p_slip=0.02)
"""After it, almost half of the sampled answers are right."""

_OPERATOR_URN = "++--*"
_SLIPS = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True, slots=True)
class _Expression:
    numbers: tuple[int, ...]
    operators: str
    """One character between each two numbers."""

    def __str__(self) -> str:
        pairs = zip(self.operators, self.numbers[1:], strict=True)
        return str(self.numbers[0]) + "".join(f"{operator}{number}" for operator, number in pairs)

    def operation(self, at: int) -> str:
        """The operation at operator `at`, e.g. `7*3`."""
        return f"{self.numbers[at]}{self.operators[at]}{self.numbers[at + 1]}"

    def result(self, at: int) -> int:
        """The value of that operation."""
        left, right = self.numbers[at], self.numbers[at + 1]
        match self.operators[at]:
            case "+":
                return left + right
            case "-":
                return left - right
            case _:
                return left * right

    def rewritten(self, at: int, value: int) -> "_Expression":
        """The expression with that operation replaced by `value`."""
        numbers = (*self.numbers[:at], value, *self.numbers[at + 2 :])
        return _Expression(numbers, self.operators[:at] + self.operators[at + 1 :])


def problem(seed: int, index: int, heldout: bool) -> Problem:
    """See `task.Task`: an expression such as `1+5+7*3+6` whose two reading orders differ."""
    expression, value = _draw(stream(seed, index, heldout), heldout)
    return Problem(str(expression), str(value))


def demonstration(seed: int, index: int, *, p_hurried: float, p_slip: float) -> Demonstration:
    """See `task.Task`.

    Args:
        seed: names the stream.
        index: position in it.
        p_hurried: chance that the whole response reads strictly left to right, ignoring precedence
            (its answer is then always wrong).
        p_slip: chance of an arithmetic slip, per operation.
    """
    rng = random.Random(f"demonstration/{seed}/{index}")
    while True:
        expression, value = _draw(rng, heldout=False)
        response = _work(rng, expression, hurried=rng.random() < p_hurried, p_slip=p_slip)
        if response is not None:
            return Demonstration(Problem(str(expression), str(value)), response)


def _draw(rng: random.Random, heldout: bool) -> tuple[_Expression, int]:
    """An expression of the split whose two reading orders differ, and its value."""
    while True:
        operators = _draw_operators(rng)
        numbers = tuple(rng.randint(1, MAX_DIGIT) for _ in range(len(operators) + 1))
        expression = _Expression(numbers, operators)
        value = _evaluate(expression, _next_by_precedence)
        if value is None:
            continue
        hurried = _evaluate(expression, _leftmost)
        if hurried is None or hurried == value:
            continue
        if is_heldout(str(expression)) == heldout:
            return expression, value


def _draw_operators(rng: random.Random) -> str:
    """One or two products, never first and never next to each other."""
    while True:
        num_operands = rng.randint(MIN_OPERANDS, MAX_OPERANDS)
        operators = "".join(rng.choice(_OPERATOR_URN) for _ in range(num_operands - 1))
        num_products = operators.count("*")
        if 1 <= num_products <= MAX_PRODUCTS and operators[0] != "*" and "**" not in operators:
            return operators


def _next_by_precedence(operators: str) -> int:
    return max(operators.find("*"), 0)


def _leftmost(operators: str) -> int:
    return 0


def _evaluate(expression: _Expression, choose: Callable[[str], int]) -> int | None:
    """The value when `choose` picks each operation, or None if an intermediate leaves the range."""
    while expression.operators:
        at = choose(expression.operators)
        value = expression.result(at)
        if not 0 <= value <= MAX_VALUE:
            return None
        expression = expression.rewritten(at, value)
    return expression.numbers[0]


def _work(
    rng: random.Random, expression: _Expression, *, hurried: bool, p_slip: float
) -> str | None:
    """The response line by line, or None where a slip led out of the range."""
    lines = []
    while expression.operators:
        at = 0 if hurried else _any_by_precedence(rng, expression.operators)
        value = expression.result(at)
        if not 0 <= value <= MAX_VALUE:
            return None
        if rng.random() < p_slip:
            value = _slip(rng, value)
        lines.append(f"{expression.operation(at)}={value}")
        expression = expression.rewritten(at, value)
        # with one operation left, the rewritten expression is the next line's left side
        if len(expression.operators) > 1:
            lines.append(str(expression))
    lines.append(f"\\boxed{{{expression.numbers[0]}}}")
    return "\n".join(lines)


def _any_by_precedence(rng: random.Random, operators: str) -> int:
    products = [i for i, operator in enumerate(operators) if operator == "*"]
    return rng.choice(products) if products else 0


def _slip(rng: random.Random, value: int) -> int:
    return rng.choice([value + by for by in _SLIPS if 0 <= value + by <= MAX_VALUE])
