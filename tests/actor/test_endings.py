import pytest

from treepo_async.actor.endings import Ending, Endings, Outcome
from treepo_async.errors import DataError

SKIPPED = Ending("a-1", Outcome.SKIPPED, "too long")
FAILED = Ending("a-2", Outcome.FAILED, "EngineError: no\nanswer")


def opened(path, *, done=(), retry_failed=False):
    return Endings(path, done=done, retry_failed=retry_failed)


def written(path):
    endings = opened(path)
    endings.add(SKIPPED)
    endings.add(FAILED)
    return endings


def test_endings_are_read_back_and_counted(tmp_path):
    written(tmp_path / "f")
    again = opened(tmp_path / "f")
    assert list(again.by_id.values()) == [SKIPPED, FAILED]
    assert again.count({"a-1", "a-2", "a-3"}) == {"skipped": 1, "failed": 1}
    assert again.count({"a-2"}) == {"failed": 1}
    assert len((tmp_path / "f").read_text().splitlines()) == 2


def test_without_an_ending_there_is_no_file(tmp_path):
    opened(tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_prompt_that_has_its_tree_now_is_struck_out(tmp_path):
    written(tmp_path / "f")
    assert list(opened(tmp_path / "f", done={"a-2"}).by_id) == ["a-1"]
    assert list(opened(tmp_path / "f").by_id) == ["a-1"]


def test_to_try_again_forgets_those_that_failed_and_the_last_one_takes_the_file_along(tmp_path):
    written(tmp_path / "f")
    assert list(opened(tmp_path / "f", retry_failed=True).by_id) == ["a-1"]
    assert not opened(tmp_path / "f", done={"a-1"}).by_id
    assert not (tmp_path / "f").exists()


def test_the_last_word_on_a_prompt_counts(tmp_path):
    endings = written(tmp_path / "f")
    endings.add(Ending("a-2", Outcome.SKIPPED, "too long after all"))
    assert opened(tmp_path / "f").by_id["a-2"].outcome is Outcome.SKIPPED


def test_a_half_written_line_is_forgotten_and_the_file_can_be_gone_on_with(tmp_path):
    written(tmp_path / "f")
    text = (tmp_path / "f").read_text()
    (tmp_path / "f").write_text(text[:-5])
    again = opened(tmp_path / "f")
    assert list(again.by_id) == ["a-1"]
    again.add(FAILED)
    assert list(opened(tmp_path / "f").by_id.values()) == [SKIPPED, FAILED]


def test_an_ending_that_cannot_be_written_is_told_with_the_file(tmp_path):
    endings = opened(tmp_path / "f")
    (tmp_path / "f").mkdir()
    with pytest.raises(DataError, match=r"f cannot be written: Is a directory; make room"):
        endings.add(FAILED)
