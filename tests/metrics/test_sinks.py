import json

import pytest

from treepo_async.metrics.sinks import JsonlSink, TensorBoardSink


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
