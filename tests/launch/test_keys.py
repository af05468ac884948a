import stat

import pytest

from launch.keys import main
from treepo_async.wire.keys import client_keys, server_keys


def test_the_files_made_are_printed_and_can_be_used(tmp_path, capsys):
    folder = tmp_path / "keys"
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out.split()
    assert sorted(printed) == sorted(str(file) for file in folder.rglob("*") if file.is_file())
    assert client_keys(str(folder), "x").server_public == server_keys(str(folder)).public


def test_further_clients_are_added_and_none_is_overwritten(tmp_path, capsys):
    folder = tmp_path / "keys"
    assert main([str(folder), "guest-1"]) == 0
    secret = (folder / "guest-1.key_secret").read_bytes()
    assert main([str(folder), "guest-2"]) == 0
    assert main([str(folder), "guest-1"]) == 2
    assert "has keys of guest-1 already" in capsys.readouterr().err
    assert (folder / "guest-1.key_secret").read_bytes() == secret
    assert stat.S_IMODE((folder / "guest-2.key_secret").stat().st_mode) == 0o600


@pytest.mark.parametrize("words", [[], ["dir=x"], ["--dir"], ["DIR", "a/b"]])
def test_a_bad_word_ends_with_2_and_writes_nothing(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert "error:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_ends_with_1(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "keys")]) == 1
    assert "error:" in capsys.readouterr().err


def test_help_says_how(capsys):
    assert main(["--help"]) == 0
    assert "python launch/keys.py DIR" in capsys.readouterr().out
