import json
from pathlib import Path

import pytest

from treepo_async.metrics.sinks import JsonlSink, SparedSink, TensorBoardSink


def test_each_step_is_one_json_line_that_is_there_at_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    sink = JsonlSink(file)
    for step in range(3):
        sink.write({"step": step, "loss": 0.5, "note": "a\nb", "gap": None})
        lines = file.read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(step + 1))
    sink.close()
    assert json.loads(lines[0]) == {"step": 0, "loss": 0.5, "note": "a\nb", "gap": None}


def test_a_file_opened_again_is_continued(tmp_path):
    for step in range(2):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write({"step": step})
        sink.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_reads_the_numbers_of_each_step(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoardSink(tmp_path)
    for step in range(3):
        sink.write(
            {"step": step, "time": 1e9 + step, "learner/loss": 0.5 * step, "trees": 7, "gap": None, "policy": "0.1"}
        )  # fmt: skip
    sink.close()
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"learner/loss", "trees"}
    assert [(e.step, e.wall_time, e.value) for e in events.Scalars("learner/loss")] == [
        (0, 1e9, 0.0),
        (1, 1e9 + 1, 0.5),
        (2, 1e9 + 2, 1.0),
    ]


class Disk:
    """A sink, and whether there is room for it."""

    def __init__(self):
        self.is_full, self.records = False, []

    def write(self, record):
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.records.append(record)

    def close(self):
        self.write("closed")


def test_records_that_a_full_disk_does_not_take_are_dropped_and_that_is_said_once():
    disk, said = Disk(), []
    sink = SparedSink(disk, "metrics.jsonl", said.append)
    for step in range(6):
        disk.is_full = step in (1, 2)
        sink.write({"step": step})
    assert [record["step"] for record in disk.records] == [0, 3, 4, 5]
    assert said == [
        "ALARM metrics.jsonl cannot be written: No space left on device; records are dropped until it can"
    ]
    disk.is_full = True
    sink.close()
    assert said[1:] == [
        "ALARM metrics.jsonl cannot be closed: No space left on device",
        "metrics.jsonl lacks 2 records",
    ]


def test_a_full_disk_is_an_error_of_the_system_at_the_write_and_none_at_the_end():
    sink = JsonlSink(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        sink.write({"step": 0})
    sink.close()


class Cut:
    """A file that takes ten bytes, and then no more until it is cut."""

    def __init__(self, file):
        self.file, self.room = file, 10

    def write(self, data):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_of_a_record_that_is_cut_short_nothing_is_left(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 0})
    whole = sink._file
    sink._file = Cut(whole)
    with pytest.raises(OSError, match="No space left"):
        sink.write({"step": 1, "loss": 0.5})
    sink._file = whole
    sink.write({"step": 2})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0}, {"step": 2}]
