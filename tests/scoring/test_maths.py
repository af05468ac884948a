r"""Answers as mathematics, compared by the real math-verify; what hangs is tested with the pool."""

import pytest

from treepo_async.scoring.failures import BadKeyError
from treepo_async.scoring.maths import maths


@pytest.mark.parametrize(
    ("given_answer", "key"),
    [
        ("18", "18"),
        ("\\frac{1}{2}", "0.5"),
        ("\\frac{2\\sqrt{2}}{4}", "\\frac{1}{\\sqrt{2}}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\{2, 1\\}", "\\{1, 2\\}"),
        ("x = 5", "5"),
        ("[1, 2)", "[1,2)"),
        ("\\begin{pmatrix} 1 & 2 \\end{pmatrix}", "\\begin{pmatrix}1&2\\end{pmatrix}"),
        ("1\\,000", "1000"),
        ("\\$1,000", "1000"),
        ("50\\%", "50"),
        ("\\text{(C)}", "(C)"),
        ("2^{10}", "1024"),
        ("\\pi r^2", "r^2 \\pi"),
    ],
)
def test_answers_that_are_equal_as_mathematics_are_right(given_answer, key):
    assert maths(f"so it is \\boxed{{{given_answer}}}.", key) == 1.0


@pytest.mark.parametrize(
    ("given_answer", "key"),
    [
        ("19", "18"),
        ("\\frac{1}{3}", "0.5"),
        ("x^2+2x", "x^2+2x+1"),
        ("\\{1, 3\\}", "\\{1, 2\\}"),
        ("[1, 2]", "[1,2)"),
        ("", "18"),
        ("\\frac{1}{", "18"),
        ("9" * 5000, "18"),
        ("???", "18"),
        ("no solution", "18"),
        ("\\frac{1}{0}", "18"),
        ("(1, 2, 3)", "(1, 2)"),
    ],
)
def test_other_answers_and_those_that_cannot_be_read_are_wrong(given_answer, key):
    assert maths(f"so it is \\boxed{{{given_answer}}}", key) == 0.0


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("\\boxed{3} or rather \\boxed{4}", 1.0),
        ("\\boxed{4} or rather \\boxed{3}", 0.0),
        ("\\boxed{3} though 4 is nice", 0.0),
        ("work\n#### 4", 1.0),
        ("work\n#### 2^2\nand not 5", 1.0),
        ("The final answer is $2^2$.", 1.0),
        ("I think it is 4", 1.0),
        ("4 or rather 3", 0.0),
        ("", 0.0),
        ("\\boxed{", 0.0),
        ("no number", 0.0),
        ("1" * 5000, 0.0),
        ("\0\ud800", 0.0),
    ],
)
def test_the_last_box_counts_and_without_a_box_what_else_looks_like_an_answer(response, score):
    assert maths(response, "4") == score


def test_a_key_may_be_a_worked_solution():
    assert maths("\\boxed{72}", "48+24 = <<48+24=72>>72\n#### 72") == 1.0
    assert maths("\\boxed{72}", "so it is $\\boxed{71}$") == 0.0


@pytest.mark.parametrize("key", ["", "???", "\\frac{1}{", "9" * 5000, "\\frac{1}{0}"])
@pytest.mark.parametrize("response", ["\\boxed{1}", ""])
def test_a_key_that_cannot_be_read_is_an_error_whatever_the_response(key, response):
    with pytest.raises(BadKeyError, match=r"cannot be read as mathematics.*reward\.scorer=exact"):
        maths(response, key)
    with pytest.raises(BadKeyError):
        maths(f"\\boxed{{{key}}}", key)


def test_a_comparison_that_raises_is_an_error_and_not_a_wrong_answer():
    with pytest.raises(KeyError, match="Unequality"):
        maths("\\boxed{x < 1}", "x \\neq 1")


@pytest.mark.parametrize(
    "long",
    [
        "foo bar " * 4000,
        "1+" * 15_000,
        "$" * 30_000,
        "{" * 30_000,
        "\\boxed{" * 4000,
        "answer " * 4000,
    ],
)
def test_a_long_response_without_an_answer_is_wrong(long):
    assert maths(long, "18") == 0.0
