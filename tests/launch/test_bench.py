"""`launch/bench.py` as a person starts it: what wrong words get, and one small sweep on a real engine."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

import launch.bench

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "layers=2",
    "hidden=64",
    "depth=3",
    "segment=4",
    "width=4",
    "prompt=130",
    "prompts=2",
    "pairs=1",
    "running=8",
]


def launched(*words, timeout_s=50):
    return subprocess.run(
        [sys.executable, "launch/bench.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampling", "widht=4"], "error: widht=4: unknown key widht; did you mean width?\n"),
        (["learner", "widht=4"], "error: widht=4: unknown key widht; did you mean width?\n"),
        (
            ["http", "request=9"],
            "error: request=9: unknown key request; the only one is requests\n",
        ),
        (
            ["http", "requests=9"],
            "error: requests=9 is not a whole number from 32, e.g. requests=640\n",
        ),
    ],
)
def test_a_wrong_word_ends_with_2_and_its_name(words, message):
    done = launched(*words)
    assert (done.returncode, done.stderr, done.stdout) == (2, message, "")


@pytest.mark.parametrize(
    ("name", "goes_on"), [("sampling", True), ("learner", True), ("async", True), ("http", False)]
)
def test_ctrl_c_says_that_it_can_be_gone_on_with_where_it_can(monkeypatch, capsys, name, goes_on):
    def interrupted(words):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.bench, "_run", interrupted)
    assert launch.bench.main([name]) == 130
    assert ("the same command goes on" in capsys.readouterr().err) == goes_on


@pytest.mark.parametrize("words", [[], ["sample"]])
def test_without_a_benchmark_of_that_name_both_are_explained(words):
    done = launched(*words)
    assert done.returncode == 2
    assert "`http [requests=640]`" in done.stderr
    assert "`sampling [depth=7]" in done.stderr


@pytest.mark.engine
@pytest.mark.timeout(240)
def test_a_sweep_writes_its_files_and_is_not_repeated(tmp_path):
    words = ["sampling", *SMALL, f"out={tmp_path}"]
    done = launched(*words, timeout_s=200)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "samples.csv").open() as stream:
        tree, independent = csv.DictReader(stream)
    assert (tree["arm"], independent["arm"]) == ("tree", "independent")
    assert float(tree["decoded_per_delivered"]) == (2 + 4 + 4) / 12
    assert float(independent["decoded_per_delivered"]) == 1
    assert float(tree["child_cached_share"]) > 0.9
    assert int(tree["computed_tokens"]) >= 2 * 130
    assert "| 3 x 4 | 4 | 2 | 130 | 1 | " in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    (entry,) = json.loads((tmp_path / "environment.json").read_text())
    assert entry["command"][1:] == words
    assert len((tmp_path / "cells.csv").read_text().splitlines()) == 2

    again = launched(*words)
    assert again.returncode == 0, again.stderr
    assert "pair" not in again.stdout
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 3
