"""Nothing is decided by the time of day: it jumps, and differs between machines."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOLD = {
    "metrics/record.py",
    "metrics/spans.py",
    "metrics/trace_log.py",
    "cluster/narrate.py",
    "engine/broadcast.py",
    "engine/publications.py",
    "learner/broadcast_desk.py",
    "learner/publish.py",
    "learner/publishers.py",
    "replay/dead_letters.py",
    "data/tokenizer.py",
}
"""Where a time of day goes into a record for a person, into a chat template, or into how long weights took to be seen."""


def calls_of_the_wall_clock(file):
    """Lines with `time.time()`, `datetime.now()` and their like."""
    names = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
    return [
        node.lineno
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and (node.value.id, node.attr) in names
    ]


def test_the_time_of_day_is_only_ever_written_down():
    package = ROOT / "treepo_async"
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if calls_of_the_wall_clock(file)
    }
    assert found == TOLD


def test_a_call_of_the_wall_clock_would_be_found(tmp_path):
    file = tmp_path / "some.py"
    file.write_text("import time\ndeadline = time.time() + 5\nnow = time.monotonic()\n")
    assert calls_of_the_wall_clock(file) == [2]
