import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.actor.journal import Journal
from treepo_async.errors import DataError
from treepo_async.wire.forms import FORMS

RNG = np.random.default_rng(8)
TREES = [random_tree(RNG, num_segments=6) for _ in range(4)]
IDS = [tree.prompt.id for tree in TREES]


def lines_of(tree, form="trees"):
    return FORMS[form].encode(tree, str)


def written(path, form="trees"):
    journal = Journal(path)
    for tree in TREES:
        journal.append(tree.prompt.id, lines_of(tree, form))
    journal.close()
    return path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_what_was_appended_is_known_when_it_is_opened_again(tmp_path, form):
    content = written(tmp_path / "j", form)
    journal = Journal(tmp_path / "j")
    assert journal.prompt_ids == set(IDS)
    journal.close()
    assert (tmp_path / "j").read_bytes() == content


@given(cut=st.integers(0, 10**6), form=st.sampled_from([*FORMS]))
def test_a_file_cut_off_anywhere_is_whole_again_and_gone_on_with(tmp_path_factory, cut, form):
    path = tmp_path_factory.mktemp("cut") / "j"
    content = written(path, form)
    os.truncate(path, cut % (len(content) + 1))
    journal = Journal(path)
    kept = IDS[: len(journal.prompt_ids)]
    assert journal.prompt_ids == set(kept)
    for tree in TREES[len(kept) :]:
        journal.append(tree.prompt.id, lines_of(tree, form))
    journal.close()
    assert path.read_bytes() == content


@pytest.mark.parametrize("rest", [b"\0" * 50, b"\0" * 50 + b"\n", b'{"prompt_id": "x"', b"{}\n"])
def test_what_a_power_cut_left_at_the_end_is_cut_off(tmp_path, rest):
    content = written(tmp_path / "j")
    with (tmp_path / "j").open("ab") as file:
        file.write(rest)
    Journal(tmp_path / "j").close()
    assert (tmp_path / "j").read_bytes() == content


def damaged(form, change):
    lines = [line + b"\n" for tree in TREES for line in lines_of(tree, form)]
    return b"".join(change(lines))


@pytest.mark.parametrize(
    ("form", "change", "reason"),
    [
        ("trees", lambda lines: [b"{}\n", *lines], "line 1"),
        ("trees", lambda lines: [lines[0][:-9] + b"\n", *lines[1:]], "line 1"),
        ("trees", lambda lines: [*lines, lines[0]], "line 5: .* out of order"),
        ("trajectories", lambda lines: lines[1:], "line 1: .* out of order"),
        ("trajectories", lambda lines: [lines[0], *lines[2:]], "line 2: .* out of order"),
    ],
    ids=["foreign", "cut", "twice", "headless", "gap"],
)
def test_damage_before_the_end_is_refused_with_its_line_and_the_way_out(
    tmp_path, form, change, reason
):
    content = damaged(form, change)
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(DataError, match=rf"j {reason}.*overwrite=true"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == content


def test_lines_that_cannot_be_written_leave_the_file_as_it_was(tmp_path, monkeypatch):
    content = written(tmp_path / "j")
    journal, write = Journal(tmp_path / "j"), os.write

    def full(fd, data):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(fd, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match=r"j cannot be written: No space left .* make room"):
        journal.append("another", lines_of(TREES[0]))
    assert journal.prompt_ids == set(IDS)
    monkeypatch.undo()
    journal.close()
    assert (tmp_path / "j").read_bytes() == content


def test_a_line_written_in_pieces_is_whole(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:37]))
    pieces = written(tmp_path / "a")
    monkeypatch.undo()
    assert pieces == written(tmp_path / "b")


def test_what_was_not_synced_yet_is_synced_once(tmp_path, monkeypatch):
    synced = []
    journal = Journal(tmp_path / "j")
    monkeypatch.setattr(os, "fsync", synced.append)
    journal.sync()
    journal.append(IDS[0], lines_of(TREES[0]))
    journal.sync()
    journal.sync()
    assert len(synced) == 1
    journal.append(IDS[1], lines_of(TREES[1]))
    journal.close()
    assert len(synced) == 2
