import pytest

from treepo_async.wire.whole_file import whole_file


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"before")
    with whole_file(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


def test_where_the_writing_raises_what_was_there_stays_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"before")

    def write():
        with whole_file(path) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
