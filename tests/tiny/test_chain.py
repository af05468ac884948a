import re
from collections import Counter
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.tiny.chain import (
    LINE_TOKENS,
    MAX_OPERATIONS,
    MIN_OPERATIONS,
    TEMPTING,
    demonstration,
    problem,
)
from treepo_async.tiny.tokenizer import build_tokenizer

SEEDS = st.integers(0, 2**32)
INDICES = st.integers(0, 10**9)
TOKENIZER = build_tokenizer()


def worked(question, choices):
    """The value when each operation takes the sum where its choice is True."""
    value, *operands = map(int, question.split("#"))
    for number, is_sum in zip(operands, choices, strict=True):
        value = value + number if is_sum else abs(value - number)
    return value


@settings(deadline=None)
@given(SEEDS, INDICES, st.booleans())
def test_the_answer_is_that_of_the_distances_and_of_no_other_choices(seed, index, heldout):
    found = problem(seed, index, heldout)
    assert re.fullmatch(r"[1-9](#[1-9])+", found.question)
    num_operations = found.question.count("#")
    assert MIN_OPERATIONS <= num_operations <= MAX_OPERATIONS
    right, *others = product((False, True), repeat=num_operations)
    assert found.answer == str(worked(found.question, right))
    assert int(found.answer) not in {worked(found.question, other) for other in others}


def test_lengths_are_drawn_evenly_and_no_answer_can_be_guessed():
    found = [problem(0, i, heldout=False) for i in range(1000)]
    lengths = Counter(each.question.count("#") for each in found)
    assert set(lengths) == {4, 5, 6}
    assert min(lengths.values()) > 280
    answers = Counter(each.answer for each in found)
    assert answers.most_common(1)[0][1] < 200


@settings(deadline=None)
@given(SEEDS, INDICES)
def test_a_careful_demonstration_has_one_line_an_operation_all_of_a_segments_length(seed, index):
    shown = demonstration(seed, index, p_hurried=0.0, p_slip=0.0)
    *lines, box = shown.response.splitlines(keepends=True)
    value, *operands = map(int, shown.problem.question.split("#"))
    for number, (line, operand) in enumerate(zip(lines, operands, strict=True), start=1):
        assert line == f"({number}) {value}#{operand}={abs(value - operand)}\n"
        assert len(TOKENIZER.encode(line).ids) == LINE_TOKENS
        value = abs(value - operand)
    assert box == f"\\boxed{{{shown.problem.answer}}}"


@settings(deadline=None)
@given(SEEDS, INDICES)
def test_a_hurried_demonstration_takes_the_sum_wherever_it_is_tempted(seed, index):
    shown = demonstration(seed, index, p_hurried=1.0, p_slip=0.0)
    _, *operands = map(int, shown.problem.question.split("#"))
    is_sum = [operand >= TEMPTING for operand in operands]
    assert shown.response.endswith(f"\\boxed{{{worked(shown.problem.question, is_sum)}}}")


def test_each_tempting_line_is_hurried_on_its_own():
    num_tempting, num_hurried = Counter(), Counter()
    for index in range(6000):
        response = demonstration(0, index, p_hurried=0.25, p_slip=0.0).response
        for line in response.splitlines()[:4]:
            place, a, b, result = map(int, re.findall(r"\d+", line))
            assert result == abs(a - b) or b >= TEMPTING
            num_tempting[place] += b >= TEMPTING
            num_hurried[place] += result == a + b
    for place in (1, 2, 3, 4):
        assert num_tempting[place] > 600
        assert 0.2 < num_hurried[place] / num_tempting[place] < 0.3


def test_tempting_lines_lie_all_along_the_response():
    num_tempting = Counter()
    for index in range(1000):
        _, *operands = problem(0, index, heldout=False).question.split("#")
        num_tempting.update(
            place for place, operand in enumerate(operands) if int(operand) >= TEMPTING
        )
    assert min(num_tempting[place] for place in range(MIN_OPERATIONS)) > 100


def test_a_slip_is_small_and_never_below_zero():
    for index in range(300):
        response = demonstration(0, index, p_hurried=0.0, p_slip=1.0).response
        for line in response.splitlines()[:-1]:
            _, a, b, result = map(int, re.findall(r"\d+", line))
            assert 0 <= abs(result - abs(a - b)) <= 2
