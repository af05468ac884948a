import itertools
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from treepo_async.engine.api_key import bearer, ensure_key, read_key
from treepo_async.errors import ConfigError


def test_a_key_is_made_once_for_its_owner_alone_and_sglang_reads_the_same(tmp_path):
    before = os.umask(0)
    try:
        key = ensure_key(tmp_path / "key.yaml")
    finally:
        os.umask(before)
    assert len(key) == 32
    assert ensure_key(tmp_path / "key.yaml") == key
    assert stat.S_IMODE((tmp_path / "key.yaml").stat().st_mode) == 0o600
    assert yaml.safe_load((tmp_path / "key.yaml").read_text()) == {"api-key": key}
    assert [file.name for file in tmp_path.iterdir()] == ["key.yaml"]


def test_two_runs_have_two_keys(tmp_path):
    assert ensure_key(tmp_path / "a") != ensure_key(tmp_path / "b")


def test_of_many_that_make_the_key_at_once_all_get_the_same(tmp_path, monkeypatch):
    pids = itertools.count()
    monkeypatch.setattr("treepo_async.engine.api_key.os.getpid", lambda: next(pids))
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: ensure_key(tmp_path / "key.yaml"), range(32)))
    assert len(keys) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["key.yaml"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_can_read_is_refused_with_the_way_out(tmp_path, mode):
    file = tmp_path / "key"
    file.write_text("secret")
    file.chmod(mode)
    with pytest.raises(ConfigError, match=r"run: chmod 600"):
        read_key(file)


@pytest.mark.parametrize(
    ("text", "key"),
    [("abc123\n", "abc123"), ("api-key: abc\n", "abc"), ('api-key: "a b"', None), ("", None)],
)
def test_a_bare_key_is_read_too_and_what_is_none_is_refused(tmp_path, text, key):
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_text(text)
    if key is None:
        with pytest.raises(ConfigError, match="holds no key"):
            read_key(file)
    else:
        assert read_key(file) == key


def test_a_key_file_that_is_not_there_is_refused_by_the_knob(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.api_key_file"):
        read_key(tmp_path / "nowhere")


def test_the_key_is_shown_as_sglang_wants_it():
    assert bearer("abc") == {"Authorization": "Bearer abc"}
    assert bearer(None) == {}
