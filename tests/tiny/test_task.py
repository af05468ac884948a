import re
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.tiny.task import (
    MAX_DIGIT,
    MAX_OPERANDS,
    MAX_VALUE,
    MIN_OPERANDS,
    demonstration,
    is_heldout,
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
@given(SEEDS, SEEDS, INDICES, INDICES)
def test_no_training_question_is_ever_held_out(seed, other_seed, index, other_index):
    training = problem(seed, index, heldout=False)
    heldout = problem(other_seed, other_index, heldout=True)
    assert training.question != heldout.question
    assert not is_heldout(training.question)
    assert is_heldout(heldout.question)
    shown = demonstration(seed, index, p_hurried=0.5, p_slip=0.1)
    assert not is_heldout(shown.problem.question)


def test_problems_are_the_same_in_every_process_and_order():
    code = (
        "from treepo_async.tiny.task import problem;"
        "print([problem(3, i, False).question for i in (5, 1)])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str([problem(3, i, heldout=False).question for i in (5, 1)])


def test_different_seeds_and_indices_give_different_problems():
    questions = {problem(seed, i, heldout=False).question for seed in (0, 1) for i in range(200)}
    assert len(questions) > 380


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


def test_importing_the_task_needs_no_torch():
    code = (
        "import sys, treepo_async.tiny.task, treepo_async.tiny.cache;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
