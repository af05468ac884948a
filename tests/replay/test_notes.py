import pytest

from tests.replay.life import Life
from treepo_async.errors import DataError
from treepo_async.replay.notes import Note, TreeRow, frames_of, sequence_of, tree_parts
from treepo_async.replay.record import Place

TREE = TreeRow(3, 1, 2**64 - 1, 6, 2, 40, 100)


@pytest.mark.parametrize("has_changes", [True, False])
def test_a_note_is_read_as_it_was_written(has_changes):
    changes = Life().commits(20)[-1].changes if has_changes else None
    note = Note(7, "run", (TREE, TREE), changes)
    assert Note.parse(note.to_parts()) == note
    assert sequence_of(note.to_parts()) == 7


@pytest.mark.parametrize(
    "parts",
    [[], [b"{"], [b"[1, 2]"], [b'[1, "r"]'], [b'[1, "r"]', b"[[3]]"], [b'[1, "r"]', b"[]", b"[]"]],
)
def test_parts_that_are_no_note_are_told(parts):
    with pytest.raises(DataError, match="cannot be read"):
        Note.parse(parts)


def test_a_tree_has_its_frames_and_its_place():
    assert frames_of(TREE, tree_parts(3, 1, 2**64 - 1, [b"one", b"", b"two"])) == [
        b"one",
        b"",
        b"two",
    ]
    assert TREE.place == Place(2, 40, 100)
    assert TREE.place.end == 140


@pytest.mark.parametrize("other", [(4, 1, 2**64 - 1), (3, 2, 2**64 - 1), (3, 1, 0)])
def test_a_record_of_another_tree_is_told(other):
    with pytest.raises(DataError, match="not that of prompt 3"):
        frames_of(TREE, tree_parts(*other, [b"one"]))
