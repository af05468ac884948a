import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.scoring.exact import exact, final_answer, normalised, number


@pytest.mark.parametrize(
    ("given_answer", "key"),
    [
        ("33", "33"),
        (" 33 ", "33"),
        ("33.", "33"),
        ("33.0", "33"),
        ("+33", "33"),
        ("-7", "−7"),
        ("0.5", "1/2"),
        (".50", "\\frac{1}{2}"),
        ("\\dfrac{2}{4}", "0.5"),
        ("\\tfrac12", "0.5"),
        ("-\\frac{1}{2}", "-1/2"),
        ("\\frac{-1}{2}", "-0.5"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("\\$1,000.50", "1000.5"),
        ("$18", "18"),
        ("50\\%", "50"),
        ("1.5e3", "1500"),
        ("\\text{Monday}", "Monday"),
        ("x \\, + \\; 1", "x+1"),
        ("\\left( 1, 2 \\right)", "(1,2)"),
        ("\\frac{\\pi}{2}", "\\frac{\\pi}{2}"),
    ],
)
def test_equal_answers_in_another_form_are_right(given_answer, key):
    assert exact(f"so \\boxed{{{given_answer}}}", key) == 1.0
    assert exact(f"so \\boxed{{{key}}}", given_answer) == 1.0


@pytest.mark.parametrize(
    ("given_answer", "key"),
    [
        ("33", "34"),
        ("0.333", "1/3"),
        ("12,34", "1234"),
        ("1,2", "12"),
        ("(1,234)", "(1234)"),
        ("1/0", "2/0"),
        ("", ""),
        ("monday", "tuesday"),
        ("\\leftarrow", "arrow"),
        ("1e2", "1e3"),
    ],
)
def test_different_answers_are_wrong(given_answer, key):
    assert exact(f"\\boxed{{{given_answer}}}", key) == 0.0


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{1}\n#### 2", "1"),
        ("work\n#### 1,000\n", "1,000"),
        ("#### 1\nmore\n#### 2", "2"),
        ("#### 1\nsee 3 #### 2", "1"),
        ("##### 5", "5"),
        ("the answer is 5", None),
        ("\\boxed{5", None),
    ],
)
def test_the_final_answer_is_the_last_box_or_else_the_last_hash_line(response, found):
    assert final_answer(response) == found


def test_a_key_may_be_a_worked_solution():
    assert exact("\\boxed{72}", "48+24 = <<48+24=72>>72\n#### 72") == 1.0
    assert exact("\\boxed{72}", "so it is $\\boxed{71}$") == 0.0


@settings(deadline=None)
@given(st.fractions(max_denominator=10**6))
def test_every_fraction_equals_itself_in_any_form(value):
    top, bottom = value.numerator, value.denominator
    assert number(f"{top}/{bottom}") == value
    assert number(f"\\frac{{{top}}}{{{bottom}}}") == value
    assert exact(f"\\boxed{{{3 * top}/{3 * bottom}}}", f"{top}/{bottom}") == 1.0
    assert exact(f"\\boxed{{{top + 1}/{bottom}}}", f"{top}/{bottom}") == 0.0


@settings(deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9))
def test_a_decimal_is_read_exactly(value):
    assert number(f"{value:f}") == Fraction(value)


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_gets_a_verdict_and_normalising_twice_changes_nothing_numeric(response, answer):
    assert exact(response, answer) in (0.0, 1.0)
    assert number(normalised(answer)) in (None, number(normalised(normalised(answer))))


@pytest.mark.parametrize(
    "hostile",
    [
        "1e999999999999",
        "9" * 1_000_000,
        "1e99999",
        "0." + "1" * 1_000_000,
        "\\text{" * 100_000,
        "\\frac{" * 100_000,
        "1,000" * 200_000,
        " " * 1_000_000,
        "\ud800",
        "१२",
    ],
)
def test_hostile_answers_are_compared_quickly_and_never_raise(hostile):
    start = time.process_time()
    for text in (hostile, f"\\boxed{{{hostile}}}", f"#### {hostile}", "####" * 1000 + hostile):
        assert exact(text, "1") == 0.0
        assert exact("\\boxed{1}", text) == 0.0
    assert time.process_time() - start < 2


def test_many_hash_marks_on_one_line_take_linear_time():
    start = time.process_time()
    assert final_answer("x #### " * 100_000) is None
    assert final_answer("x\n####" * 100_000) == ""
    assert time.process_time() - start < 2


def test_a_number_with_a_huge_exponent_stays_text():
    assert number("1e1000") == 10**1000
    assert number("1e1001") is None
    assert number("1e-1001") is None
