import csv
import json

import pytest

from treepo_async.bench.cell_runs import Cell, attempt, is_finished, read_state
from treepo_async.bench.sweep import cells_of, parse, run
from treepo_async.errors import ConfigError, TreepoError


class Launcher:
    """Makes the folders of runs; those whose keys have a word in `broken` fail."""

    def __init__(self, broken=()):
        self.broken = broken
        self.made = []

    def __call__(self, keys, log, timeout_s=0.0):
        values = dict(key.split("=", 1) for key in keys)
        folder = log.with_suffix("")
        assert values["run_dir"] == str(log.parent / folder.name)
        self.made.append(log.stem)
        log.write_text("out of memory")
        if any(word in keys for word in self.broken):
            return 1
        model = log.parent / log.stem / "model"
        model.mkdir(parents=True)
        (model / "policy_version").write_text("0.4")
        return 0


def silent(line):
    pass


def grid(tmp_path, *more):
    return parse(["seed=0,1", "learner.correction=none,truncated", f"out={tmp_path}", *more])


def rows_of(folder):
    with (folder / "index.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_grid_has_a_cell_for_each_combination(tmp_path):
    sweep = grid(tmp_path, "keys=steps=4 actors=1", "ray=auto", "url=http://a:1")
    assert [cell.label for cell in sweep.cells] == [
        "seed=0-correction=none",
        "seed=0-correction=truncated",
        "seed=1-correction=none",
        "seed=1-correction=truncated",
    ]
    assert sweep.cells[1].keys == ("seed=0", "learner.correction=truncated")
    assert sweep.common == ("steps=4", "actors=1")
    assert sweep.warm == (
        "engine.url=http://a:1",
        "cluster.ray_address=auto",
    )


def test_another_address_of_what_is_warm_makes_no_other_run_of_a_cell(tmp_path):
    run(grid(tmp_path, "url=http://a:1"), Launcher(), silent)
    again = Launcher()
    run(grid(tmp_path, "url=http://b:2"), again, silent)
    assert again.made == []


def test_values_with_commas_are_written_in_brackets():
    assert [cell.keys for cell in cells_of({"a.b": "[1,2],3"})] == [("a.b=[1,2]",), ("a.b=3",)]


def test_a_finished_cell_is_skipped_and_a_failed_one_tried_again(tmp_path):
    first = Launcher(broken=["seed=1"])
    with pytest.raises(TreepoError, match="2 of 4 cells failed: seed=1-correction=none"):
        run(grid(tmp_path), first, silent)
    assert len(first.made) == 4
    rows = rows_of(tmp_path)
    assert [row["state"] for row in rows] == ["done", "done", "failed", "failed"]
    assert (rows[2]["reason"], rows[2]["seed"], rows[2]["learner.correction"]) == (
        "out of memory",
        "1",
        "none",
    )
    second = Launcher()
    run(grid(tmp_path), second, silent)
    assert second.made == ["seed=1-correction=none", "seed=1-correction=truncated"]
    assert [(row["state"], row["attempts"]) for row in rows_of(tmp_path)] == [
        ("done", "1"),
        ("done", "1"),
        ("done", "2"),
        ("done", "2"),
    ]


def test_the_time_that_is_left_is_told_after_each_cell(tmp_path):
    lines = []
    run(grid(tmp_path), Launcher(), lines.append)
    assert [line.partition(": ")[0] for line in lines] == [
        "[1/4] seed=0-correction=none",
        "[2/4] seed=0-correction=truncated",
        "[3/4] seed=1-correction=none",
        "[4/4] seed=1-correction=truncated",
    ]
    assert "3 left, about 0 min" in lines[0]
    assert "left" not in lines[3]


def test_a_cell_that_was_stopped_midway_is_gone_on_with_by_the_same_keys_alone(tmp_path):
    def stopped(keys, log):
        (tmp_path / "a").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(Cell("a", ()), ["steps=4"], tmp_path, stopped)
    state = read_state(tmp_path / "a")
    assert (state.code, state.reason, state.attempts) == (-1, "stopped", 1)
    launcher = Launcher()
    with pytest.raises(ConfigError, match="holds a run with steps=4, not with steps=5"):
        attempt(Cell("a", ()), ["steps=5"], tmp_path, launcher)
    assert launcher.made == []
    state = attempt(Cell("a", ()), ["steps=4"], tmp_path, launcher)
    assert (state.code, state.attempts) == (0, 2)
    assert is_finished(tmp_path / "a")


def test_a_run_that_ends_well_without_its_model_has_failed(tmp_path):
    state = attempt(Cell("a", ()), [], tmp_path, lambda keys, log: 0)
    assert state.code == -1
    assert read_state(tmp_path / "a") == state


def test_a_folder_with_other_keys_is_left_alone(tmp_path):
    attempt(Cell("a", ("seed=0",)), [], tmp_path, Launcher())
    with pytest.raises(ConfigError, match="holds a run with seed=0, not with seed=1"):
        attempt(Cell("a", ("seed=1",)), [], tmp_path, Launcher())
    assert json.loads((tmp_path / "a.cell.json").read_text())["keys"] == ["seed=0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seed=0"], "out=DIR is missing"),
        (["out=x"], "no grid is given"),
        (["seed=0", "seed=1", "out=x"], "seed is given twice"),
        (["seed", "out=x"], "is not KEY=VALUE"),
        (["seed=0", "out=x", "warm=large"], "warm=large is one of tiny"),
        (["seed=0", "out=x", "warm=tiny", "url=http://a:1"], "goes without url"),
        (["seed=0,0", "out=x"], "two cells are called seed=0"),
        (["a.lr=1", "b.lr=1", "a.lr=2", "out=x"], "given twice"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)
