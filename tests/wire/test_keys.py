import os
import stat

import pytest

from treepo_async.errors import ConfigError
from treepo_async.wire.keys import client_keys, is_allowed, make_keys, server_keys


@pytest.fixture
def folder(tmp_path):
    make_keys(tmp_path / "keys", ["client", "guest-1"])
    return tmp_path / "keys"


def modes(folder):
    return {
        str(file.relative_to(folder)): stat.S_IMODE(file.stat().st_mode)
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_secrets_are_readable_by_their_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    found = modes(tmp_path / "keys")
    assert found["server.key_secret"] == found["client.key_secret"] == 0o600
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert set(found) == {
        "server.key_secret",
        "server.key",
        "client.key_secret",
        "allowed/client.key",
    }


def test_keys_are_not_overwritten_and_those_of_more_clients_are_added(folder):
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="has keys of client already"):
        make_keys(folder, ["guest-2", "client"])
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    make_keys(folder, ["guest-2"])
    assert all(file.read_bytes() == content for file, content in before.items())
    assert is_allowed(folder / "allowed", client_keys(str(folder), "guest-2").public)


@pytest.mark.parametrize("lost", ["server.key", "server.key_secret"])
def test_half_of_the_servers_keys_is_not_taken_for_none(folder, lost):
    (folder / lost).unlink()
    with pytest.raises(ConfigError, match="only one of the server's two keys"):
        make_keys(folder, ["guest-2"])
    assert not (folder / lost).exists()
    assert not (folder / "guest-2.key_secret").exists()


@pytest.mark.parametrize("name", ["../up", "server", "", "a/b", "a.b", " "])
def test_a_name_that_would_be_another_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot name a client"):
        make_keys(tmp_path, [name])
    assert list(tmp_path.iterdir()) == []


def test_a_client_has_its_own_keys_or_those_for_all(folder):
    own, shared = client_keys(str(folder), "guest-1"), client_keys(str(folder), "actor-0")
    assert own.public != shared.public
    assert own.server_public == shared.server_public == server_keys(str(folder)).public
    assert client_keys(None, "actor-0") is None
    assert server_keys(None) is None


def test_a_client_whose_file_is_gone_is_not_allowed_any_more(folder):
    guest, other = (client_keys(str(folder), name).public for name in ("guest-1", "actor-0"))
    assert is_allowed(folder / "allowed", guest)
    (folder / "allowed" / "guest-1.key").unlink()
    assert not is_allowed(folder / "allowed", guest)
    assert is_allowed(folder / "allowed", other)


def test_a_damaged_file_lets_nobody_in_and_keeps_nobody_out(folder):
    (folder / "allowed" / "broken.key").write_text("no key")
    (folder / "allowed" / "bytes.key").write_bytes(b"\xff\x00" * 10)
    assert is_allowed(folder / "allowed", client_keys(str(folder), "actor-0").public)
    assert not is_allowed(folder / "allowed", b"x" * 40)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_secret_that_others_can_read_is_refused_with_the_way_out(folder, mode):
    (folder / "server.key_secret").chmod(mode)
    (folder / "client.key_secret").chmod(mode)
    with pytest.raises(ConfigError, match=r"run: chmod 600 .*server\.key_secret"):
        server_keys(str(folder))
    with pytest.raises(ConfigError, match=r"run: chmod 600 .*client\.key_secret"):
        client_keys(str(folder), "actor-0")


def test_an_allow_list_that_others_can_write_is_refused(folder):
    (folder / "allowed").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        server_keys(str(folder))


def test_missing_or_damaged_keys_are_refused_with_the_way_to_make_them(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"python launch/keys\.py"):
        server_keys(str(tmp_path / "nowhere"))
    (folder / "server.key").write_text('curve\n    public-key = "short"\n')
    with pytest.raises(ConfigError, match="damaged"):
        client_keys(str(folder), "actor-0")


def test_no_secret_is_in_what_is_printed_of_keys(folder):
    for keys in (server_keys(str(folder)), client_keys(str(folder), "guest-1")):
        assert keys.secret.decode() not in f"{keys} {keys!r}"
