import json

import pytest

from launch.trace import main
from tests.metrics.trace_rules import faults_of
from treepo_async.metrics.trace_log import TRACE_FILE

RECORDS = [
    {"at": 10.0, "role": "actor-0", "instant": "started", "args": {"pid": 1}},
    {
        "at": 11.0,
        "s": 2.0,
        "role": "actor-0",
        "track": "slot-0",
        "name": "grow",
        "category": "compute",
        "args": {"lease": "a", "newest": "0.0"},
    },
]


@pytest.fixture
def run_dir(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / TRACE_FILE).write_text(lines)
    return tmp_path


def test_a_trace_is_written_beside_its_run_or_where_it_is_asked_for(run_dir, tmp_path, capsys):
    assert main([str(run_dir)]) == 0
    assert main([str(run_dir), f"out={tmp_path / 'other.json'}"]) == 0
    written = [json.loads((tmp_path / name).read_text()) for name in ("trace.json", "other.json")]
    assert written[0] == written[1]
    assert faults_of(written[0]) == []
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"{run_dir / 'trace.json'}: 1 spans, 0 counts, 1 instants, 0 arrows of 3.0 s"
    )


def test_a_folder_without_a_trace_is_refused_with_the_key_that_makes_one(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "metrics.trace=true" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "to=b"]])
def test_a_bad_word_is_refused_with_the_usage(words, capsys):
    assert main(words) == 2
    assert "RUN [out=FILE]" in capsys.readouterr().err
