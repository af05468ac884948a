import csv
import json

import pytest

from tests.bench.runs import TREE, evaluation, step, write_run
from treepo_async.bench.staleness import combined, parse, row_of, table, write
from treepo_async.bench.staleness_runs import read_run
from treepo_async.errors import ConfigError, DataError

RECORDS = [
    evaluation(0, 0.4),
    step(1),
    step(2),
    evaluation(2, 0.5),
    step(3),
    step(4),
    evaluation(4, 0.8),
]


def test_a_point_has_the_tokens_and_the_time_until_its_evaluation(tmp_path):
    points = read_run(write_run(tmp_path / "a", RECORDS)).points
    found = [(p.step, p.trained_tokens, p.trained_tokens_unique, p.decoded_tokens) for p in points]
    assert found == [(0, 0, 0, 0), (2, 320, 200, 300), (4, 640, 400, 600)]
    assert [p.seconds for p in points] == [0.0, 2.0, 4.0]


@pytest.mark.parametrize("loss", [None, True])
def test_a_run_says_what_it_was_told_and_how_stale_it_was(tmp_path, loss):
    folder = write_run(
        tmp_path / "a", RECORDS, staleness=3, correction="truncated", seed=7, loss=loss
    )
    run = read_run(folder)
    assert (run.max_staleness, run.correction, run.seed, run.has_ended) == (3, "truncated", 7, True)
    assert (run.staleness_mean, run.staleness_max, run.reward, run.step_s) == (0.5, 1, 0.4, 2.0)
    assert run.ess == {"0": (320, 1.0), "1": (320, 0.5)}


def test_of_two_records_of_a_step_the_later_one_counts(tmp_path):
    again = step(2, **{"tokens/unique": 1000})
    records = [evaluation(0, 0.4), step(1), step(2), again, evaluation(2, 0.5)]
    assert read_run(write_run(tmp_path / "a", records)).points[-1].trained_tokens_unique == 1100


def test_a_run_that_broke_off_counts_as_tried_and_its_numbers_do_not(tmp_path):
    whole = read_run(write_run(tmp_path / "a", RECORDS))
    broken = write_run(tmp_path / "b", RECORDS[:4])
    with (broken / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(3))[:20])
    row = row_of((1, "none"), [whole, read_run(broken)])
    assert (row.ended, row.runs, row.accuracy, row.accuracy_sd) == (1, 2, 0.8, None)
    assert "| 1 of 2 | 0.800 |" in table([row])


def test_a_combination_has_mean_and_deviation_over_its_seeds(tmp_path):
    runs = [
        read_run(write_run(tmp_path / f"{seed}", [*RECORDS[:-1], evaluation(4, last)], seed=seed))
        for seed, last in enumerate([0.7, 0.8, 0.9])
    ]
    row = row_of((1, "none"), runs)
    assert (row.accuracy, row.accuracy_sd) == (pytest.approx(0.8), pytest.approx(0.1))
    assert row.halfway == 0.5
    assert "0.800 ± 0.100" in table([row])


def test_a_combination_of_which_no_run_ended_has_a_row_without_numbers(tmp_path):
    row = row_of((1, "none"), [read_run(write_run(tmp_path / "a", RECORDS[:4]))])
    assert row.accuracy is None
    assert "| 1 | none | 0 of 1 |  |  |  |  |  |" in table([row])


def test_rows_come_by_staleness_and_then_by_correction(tmp_path):
    runs = [
        read_run(write_run(tmp_path / f"{k}{c}", RECORDS, staleness=k, correction=c))
        for k, c in [(8, "none"), (0, "importance"), (0, "truncated"), (0, "none"), (0, "icepop")]
    ]
    assert list(combined(runs)) == [
        (0, "none"),
        (0, "truncated"),
        (0, "importance"),
        (0, "icepop"),
        (8, "none"),
    ]


def test_table_points_and_picture_are_written(tmp_path):
    for seed in range(2):
        write_run(tmp_path / "runs" / f"s{seed}", RECORDS, seed=seed)
    folders, out = parse([str(tmp_path / "runs"), f"out={tmp_path / 'out'}"])
    text = write(folders, out)
    assert (out / "staleness.md").read_text() == text
    with (out / "staleness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["run"], r["step"], r["sampled_accuracy"]) for r in rows[:3]] == [
        ("s0", "0", "0.4"),
        ("s0", "2", "0.5"),
        ("s0", "4", "0.8"),
    ]
    assert (out / "staleness.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_in_another_key_are_not_put_together(tmp_path):
    folders = [
        write_run(tmp_path / "a", RECORDS, run_dir="a", cluster={"host": "one"}),
        write_run(tmp_path / "b", RECORDS, run_dir="b", cluster={"host": "two"}, staleness=2),
        write_run(tmp_path / "c", RECORDS, correction="truncated", seed=1),
    ]
    write(folders, tmp_path / "out")
    folders.append(write_run(tmp_path / "d", RECORDS, staleness=8, tree=TREE | {"width": 16}))
    with pytest.raises(DataError, match=r"a and d differ in tree.width \(8 and 16\), so they"):
        write(folders, tmp_path / "out")


def test_a_seed_counts_once_in_a_combination(tmp_path):
    folders = [write_run(tmp_path / name, RECORDS, seed=3) for name in ("a", "b")]
    with pytest.raises(DataError, match=r"a and b both have .*=1 .*=none seed=3"):
        write(folders, tmp_path / "out")


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no folder of a run"):
        parse([str(tmp_path)])
    with pytest.raises(DataError, match="no run has an evaluation"):
        write([write_run(tmp_path / "a", [step(1)])], tmp_path / "out")
