import pytest

from treepo_async.errors import DataError
from treepo_async.replay.log import Log
from treepo_async.replay.record import HEADER_BYTES, Kind, Place, length_of
from treepo_async.replay.segments import CHUNK_BYTES, bytes_at, file_of, read_at, scan


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path, 1000)
    log.begin(1, [b"snapshot"])
    yield log
    log.close()


def tree(number, num_bytes=100):
    return Kind.TREE, [bytes([number]), bytes([number]) * num_bytes]


def kinds(scanned):
    return [found.kind for found in scanned]


def damage(folder, segment, offset, data=b"\xff"):
    with file_of(folder, segment).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_damaged_payload_is_told_and_what_follows_is_read(log):
    first, second = log.append([tree(1), tree(2)])
    damage(log.folder, 1, first.end - 1)
    *_, bad, good = scan(log.folder, 1)
    assert (bad.place, bad.kind) == (first, None)
    assert (good.place, good.kind) == (second, Kind.TREE)
    assert len(bytes_at(log.folder, first)) == first.length
    with pytest.raises(DataError, match="damaged"):
        read_at(log.folder, first)


def test_behind_a_damaged_header_the_next_whole_one_is_found(log):
    first, second, _ = log.append([tree(1, 3_000_000), tree(2), tree(3)])
    damage(log.folder, 1, first.offset)
    found = list(scan(log.folder, 1))
    assert kinds(found) == [Kind.SNAPSHOT, None, Kind.TREE, Kind.TREE]
    assert found[1].place == first
    assert found[2].place == second


@pytest.mark.parametrize("behind", [-1, 0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 1])
def test_a_header_at_the_edge_of_what_is_read_at_once_is_found(log, behind):
    num_bytes = CHUNK_BYTES + 1 + behind - length_of(tree(1, 0)[1])
    first, second = log.append([tree(1, num_bytes), tree(2)])
    damage(log.folder, 1, first.offset)
    assert [found.place for found in scan(log.folder, 1)][1:] == [first, second]


def test_a_copy_of_a_record_inside_a_damaged_tree_is_not_taken_for_one(log):
    (first,) = log.append([tree(1)])
    copy = bytes_at(log.folder, first)
    second, third = log.append([(Kind.TREE, [b"text of a model", copy]), tree(3)])
    damage(log.folder, 1, second.offset)
    assert [found.place for found in scan(log.folder, 1)][1:] == [first, second, third]


def test_a_torn_record_is_a_range_to_the_end(log):
    first, second = log.append([tree(1), tree(2)])
    for end in (second.offset + HEADER_BYTES + 3, second.offset + 3):
        with file_of(log.folder, 1).open("r+b") as file:
            file.truncate(end)
        *_, last = scan(log.folder, 1)
        assert (last.kind, last.place) == (None, Place(1, second.offset, end - second.offset))
    assert read_at(log.folder, first)


def test_a_record_that_is_not_read_is_passed_over_unchecked(log):
    first, _ = log.append([tree(1), (Kind.NOTE, [b"note"])])
    damage(log.folder, 1, first.end - 1)
    found = list(scan(log.folder, 1, first.offset, read=(Kind.NOTE,)))
    assert kinds(found) == [Kind.TREE, Kind.NOTE]
    assert [each.parts for each in found] == [[], [b"note"]]


def test_a_place_in_no_file_is_told(log):
    with pytest.raises(DataError, match="segment 7 is not there"):
        read_at(log.folder, Place(7, 0, 100))
    assert bytes_at(log.folder, Place(7, 0, 100)) == b""
