import re

from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.tiny.precedence import (
    MAX_DIGIT,
    MAX_OPERANDS,
    MAX_VALUE,
    MIN_OPERANDS,
    demonstration,
    problem,
)

SEEDS = st.integers(0, 2**32)
INDICES = st.integers(0, 10**9)


def left_to_right(question):
    numbers = re.findall(r"\d+", question)
    value = numbers[0]
    for operator, number in zip(re.findall(r"[-+*]", question), numbers[1:], strict=True):
        value = str(eval(value + operator + number))
    return value


@settings(deadline=None)
@given(SEEDS, INDICES, st.booleans())
def test_the_answer_is_what_python_evaluates_and_reading_left_to_right_is_wrong(
    seed, index, heldout
):
    found = problem(seed, index, heldout)
    assert found.answer == str(eval(found.question))
    assert found.answer != left_to_right(found.question)
    assert 0 <= int(found.answer) <= MAX_VALUE


@settings(deadline=None)
@given(SEEDS, INDICES)
def test_a_question_has_a_few_small_operands(seed, index):
    operands = re.split(r"[-+*]", problem(seed, index, heldout=False).question)
    assert MIN_OPERANDS <= len(operands) <= MAX_OPERANDS
    assert all(1 <= int(operand) <= MAX_DIGIT for operand in operands)


@settings(deadline=None)
@given(SEEDS, INDICES)
def test_a_careful_demonstration_is_right_line_by_line(seed, index):
    shown = demonstration(seed, index, p_hurried=0.0, p_slip=0.0)
    assert shown.response.endswith(f"\\boxed{{{shown.problem.answer}}}")
    for line in shown.response.splitlines()[:-1]:
        # every line is an operation with its result, or the whole expression rewritten
        assert len({eval(side) for side in (*line.split("="), *shown.problem.answer.split())}) <= 2
        if "=" in line:
            operation, result = line.split("=")
            assert eval(operation) == int(result)
        else:
            assert eval(line) == int(shown.problem.answer)


@settings(deadline=None)
@given(SEEDS, INDICES)
def test_a_hurried_demonstration_reads_left_to_right(seed, index):
    shown = demonstration(seed, index, p_hurried=1.0, p_slip=0.0)
    assert shown.response.endswith(f"\\boxed{{{left_to_right(shown.problem.question)}}}")


def test_demonstrations_are_of_mixed_quality():
    shown = [demonstration(0, i, p_hurried=0.42, p_slip=0.02) for i in range(1000)]
    num_right = sum(d.response.endswith(f"\\boxed{{{d.problem.answer}}}") for d in shown)
    assert 480 < num_right < 620
