import math

import numpy as np
import pytest

from tests.fakes import text_of
from treepo_async.actor.settings import path_value
from treepo_async.errors import ConfigError
from treepo_async.tree.rules import PartialPath


def path(text, logprob=-1.0):
    tokens = np.array([ord(c) for c in text], np.int32)
    return PartialPath(tokens, np.full(len(tokens), logprob, np.float32))


PATHS = [path("so 4 "), path("so 4 "), path("so 5 ", -2.0)]


def half_of_its_length(text, texts):
    assert text in texts
    return len(text) / 2


def failing(_text, _texts):
    raise RuntimeError("no value")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("agreement", 1 / 3),
        ("logprob", -2.0),
        ("tests.actor.test_settings:half_of_its_length", 2.5),
    ],
)
def test_a_value_is_found_by_its_name(name, value):
    assert path_value(name, text_of)(PATHS[2], PATHS) == pytest.approx(value)


def test_a_value_that_raises_judges_nothing(caplog):
    value = path_value("tests.actor.test_settings:failing", text_of)
    assert math.isnan(value(PATHS[0], PATHS))
    assert "prune.value=tests.actor.test_settings:failing failed" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("agrement", "is not agreement, logprob or package.module:function"),
        ("nowhere:at_all", "cannot be imported"),
        ("tests.fakes:nothing", "cannot be imported"),
        ("tests.fakes:EOS", "is a int, not a function"),
    ],
)
def test_a_value_that_is_not_there_is_refused_by_name(name, message):
    with pytest.raises(ConfigError, match=f"prune.value={name}.*{message}"):
        path_value(name, text_of)
