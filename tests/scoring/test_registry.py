import math

import numpy as np
import pytest

from treepo_async.errors import ConfigError
from treepo_async.scoring.exact import exact
from treepo_async.scoring.failures import BadKeyError, Failure
from treepo_async.scoring.maths import maths
from treepo_async.scoring.registry import attempt, check_name, get_scorer


def test_exact_and_math_are_built_in():
    assert get_scorer("exact") is exact
    assert get_scorer("math") is maths


@pytest.mark.parametrize(("name", "meant"), [("exakt", "exact"), ("maths", "math")])
def test_a_misspelt_name_is_refused_with_the_nearest_one(name, meant):
    for refuse in (check_name, get_scorer):
        with pytest.raises(
            ConfigError,
            match=rf"'{name}' is unknown; did you mean {meant}\?.*exact, math.*module:function",
        ):
            refuse(name)


def test_a_name_is_checked_without_an_import():
    check_name("no_such_module_here:f")
    check_name("math")


def test_a_users_function_is_imported_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def half(response, answer):\n    return 0.5\nLIMIT = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert get_scorer("my_rules:half")("a", "b") == 0.5
    with pytest.raises(ConfigError, match="my_rules:LIMIT' is a int, not a function"):
        get_scorer("my_rules:LIMIT")
    with pytest.raises(ConfigError, match=r"cannot be imported.*has no attribute 'third'"):
        get_scorer("my_rules:third")


@pytest.mark.parametrize("name", ["no_such_module_here:f", ":f", "math:"])
def test_a_function_that_is_not_there_is_refused(name):
    with pytest.raises(ConfigError, match="cannot be imported"):
        get_scorer(name)


@pytest.mark.parametrize(
    "returned",
    [0.5, True, 1, -3.0, np.float32(0.25), np.array(0.25), np.bool_(True)],
)
def test_any_finite_number_is_an_accuracy(returned):
    result = attempt(lambda *_: returned, "response", "answer")
    assert (result.accuracy, result.failure) == (float(returned), None)


@pytest.mark.parametrize(
    "returned",
    [
        "high",
        "1.0",
        b"1",
        math.inf,
        math.nan,
        None,
        np.ones(2),
        1j,
        [1.0],
        10**400,
        1e100,
        -3.5e38,
    ],
)
def test_anything_else_is_a_failure_that_shows_what_was_returned(returned):
    result = attempt(lambda *_: returned, "response", "answer")
    assert math.isnan(result.accuracy)
    assert result.failure is Failure.NOT_FINITE
    assert f"returned a {type(returned).__name__}" in result.detail


class Spiteful:
    """Nothing about it can be asked."""

    def __float__(self):
        raise TypeError

    def __repr__(self):
        raise ZeroDivisionError("not even this")


@pytest.mark.parametrize(
    "raised", [KeyError("the key"), SystemExit(3), RecursionError(), MemoryError()]
)
def test_a_scorer_that_raises_is_a_failure_with_its_traceback(raised):
    def failing(response, answer):
        raise raised

    result = attempt(failing, "response", "answer")
    assert math.isnan(result.accuracy)
    assert result.failure is Failure.RAISED
    assert "in failing" in result.detail
    assert type(raised).__name__ in result.detail


def test_a_result_that_cannot_be_shown_is_a_failure():
    assert attempt(lambda *_: Spiteful(), "", "").failure is Failure.RAISED


def test_a_scorer_may_say_that_the_key_is_bad():
    def failing(response, answer):
        raise BadKeyError(f"{answer} is no key")

    result = attempt(failing, "response", "seven")
    assert (result.failure, result.detail) == (Failure.BAD_KEY, "seven is no key")


def test_a_long_detail_keeps_its_end():
    def failing(response, answer):
        raise BadKeyError("x" * 10_000 + "!")

    detail = attempt(failing, "", "").detail
    assert len(detail) == 4000
    assert detail.endswith("x!")


def test_an_interrupt_inside_a_scorer_is_not_swallowed():
    def interrupted(response, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(interrupted, "", "")
