import logging
import math

import pytest

from treepo_async.errors import ConfigError
from treepo_async.scoring.exact import exact
from treepo_async.scoring.registry import get_scorer, reward, score


def test_exact_is_built_in():
    assert get_scorer("exact") is exact


def test_a_misspelt_name_is_refused_with_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"'exakt' is unknown; did you mean exact\?.*module:function"
    ):
        get_scorer("exakt")


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


def failing(response, answer):
    raise KeyError(answer)


@pytest.mark.parametrize("returned", ["high", math.inf, math.nan, None])
def test_a_scorer_that_returns_no_finite_number_gives_nan_and_a_log_line(returned, caplog):
    with caplog.at_level(logging.WARNING):
        assert math.isnan(score(lambda r, a: returned, "response", "answer"))
    assert "counts as unscored" in caplog.text


def test_a_scorer_that_raises_gives_nan_and_a_log_line(caplog):
    with caplog.at_level(logging.WARNING):
        assert math.isnan(score(failing, "response", "answer"))
    assert "KeyError" in caplog.text
    assert "counts as unscored" in caplog.text


def test_a_scorer_that_works_gives_its_accuracy_silently(caplog):
    assert score(exact, "\\boxed{1}", "1") == 1.0
    assert score(lambda r, a: True, "", "") == 1.0
    assert caplog.text == ""


def test_an_interrupt_inside_a_scorer_is_not_swallowed():
    def interrupted(response, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted, "", "")


def test_the_reward_is_linear_and_exact_at_both_ends():
    assert reward(1.0, 0.1, -0.3) == 0.1
    assert reward(0.0, 0.1, -0.3) == -0.3
    assert reward(0.25, 1.0, -1.0) == -0.5
    assert math.isnan(reward(math.nan, 1.0, -1.0))
