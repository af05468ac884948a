import pytest

from treepo_async.config.cores import parse_cores
from treepo_async.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "cores"), [("0", {0}), ("0,4-7", {0, 4, 5, 6, 7}), ("2-2, 5", {2, 5})]
)
def test_cores_are_numbers_and_ranges(text: str, cores: set[int]) -> None:
    assert parse_cores("engine.cores", text) == cores


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "0,,1", "0 1"])
def test_other_text_is_refused_with_the_key_and_the_value(text: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.cores={text} does not name"):
        parse_cores("engine.cores", text)
