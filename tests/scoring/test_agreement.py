import math

import pytest

from treepo_async.scoring.agreement import agreement, partial_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("", None),
        ("no number here", None),
        ("so 12 apples", "12"),
        ("so 12", None),  # the next token may be a digit
        ("so 12.", None),
        ("so 12. Then", "12"),
        ("1,200 and -3.5 left", "-3.5"),
        (r"first 7 then \boxed{8} and 9 ", "8"),
        ("#### 42\n", "42"),
        ("5.-3 left", "-3"),
        ("12..5 left", "5"),
        ("1.2.3.4", None),
        ("from 1.5, 2.5.", "1.5"),
    ],
)
def test_a_partial_answer_is_the_box_or_the_last_whole_number(response, answer):
    assert partial_answer(response) == answer


def test_agreement_is_the_share_of_answers_equal_to_this_one():
    responses = ["it is 4 ", "it is 4.0 ", "it is 5 ", "no idea"]
    assert agreement(responses[0], responses) == pytest.approx(2 / 3)
    assert agreement(responses[2], responses) == pytest.approx(1 / 3)


def test_a_response_without_a_partial_answer_has_no_agreement():
    assert math.isnan(agreement("no idea", ["no idea", "it is 5 "]))


@pytest.mark.parametrize("text", ["1" * 300_000, "1." * 150_000 + "1"])
def test_a_long_number_takes_time_linear_in_its_length(text):
    # where it is quadratic, this does not end before the deadline of all tests
    assert partial_answer(text) is None
