import os

import pytest

from treepo_async import chaos
from treepo_async.replay.log import Log
from treepo_async.replay.record import Kind
from treepo_async.replay.segments import file_of, read_at, scan, segments_of


@pytest.fixture
def log(tmp_path):
    log = Log(tmp_path, 1000)
    log.begin(1, [b"snapshot"])
    yield log
    log.close()


def tree(number, num_bytes=100):
    return Kind.TREE, [bytes([number]), bytes([number]) * num_bytes]


def test_records_are_appended_in_order_and_each_read_at_its_place(log):
    places = log.append([tree(1), tree(2, 0)]) + log.append([(Kind.NOTE, [b"note"])])
    log.sync()
    assert [read_at(log.folder, place)[0] for place in places] == [b"\x01", b"\x02", b"note"]
    assert places[0].end == places[1].offset
    kinds = [found.kind for found in scan(log.folder, log.segment)]
    assert kinds == [Kind.SNAPSHOT, Kind.TREE, Kind.TREE, Kind.NOTE]


def test_what_is_cut_was_never_there(log):
    (first,) = log.append([tree(1)])
    log.append([tree(2)])
    log.cut(first.end)
    (third,) = log.append([tree(3)])
    assert third.offset == first.end
    assert [found.parts[0] for found in scan(log.folder, 1)][1:] == [b"\x01", b"\x03"]


def test_a_segment_is_full_at_its_size_counted_behind_its_snapshot(log):
    log.append([tree(1, 800)])
    assert not log.is_full
    log.append([tree(2, 200)])
    assert log.is_full
    log.begin(2, [bytes(5000)])
    log.append([tree(3, 2000)])
    assert not log.is_full, "a log of snapshots alone would be of no use"
    assert segments_of(log.folder) == [1, 2]


def test_a_segment_that_there_is_is_not_written_over(log):
    before = file_of(log.folder, 1).read_bytes()
    with pytest.raises(FileExistsError):
        log.begin(1, [b"other"])
    assert file_of(log.folder, 1).read_bytes() == before


def test_more_buffers_than_one_call_takes_are_all_written(log):
    parts = [b"%d" % i for i in range(3000)]
    (place,) = log.append([(Kind.TREE, parts)])
    assert read_at(log.folder, place) == parts


def test_what_could_be_written_only_in_part_is_taken_back(log, monkeypatch):
    before = file_of(log.folder, 1).read_bytes()
    answers = iter(["short", "full"])

    def point(_):
        if (answer := next(answers)) == "full":
            raise OSError(28, "no room")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(chaos, "point", point)
        with pytest.raises(OSError, match="no room"):
            log.append([tree(1)])
    assert file_of(log.folder, 1).read_bytes() == before
    (place,) = log.append([tree(1)])
    assert read_at(log.folder, place)[0] == b"\x01"


def test_nothing_is_appended_before_the_end_of_a_failed_write_is_gone(log, monkeypatch):
    (first,) = log.append([tree(1)])
    log.append([tree(2), (Kind.NOTE, [b"never acknowledged"])])

    def ftruncate(*_):
        raise OSError(5, "no cutting")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", ftruncate)
        log.cut(first.end)
        for _ in range(2):
            with pytest.raises(OSError, match="no cutting"):
                log.append([tree(3, 0)])
    log.append([tree(3, 0)])
    assert [found.parts[0] for found in scan(log.folder, 1)][1:] == [b"\x01", b"\x03"]
