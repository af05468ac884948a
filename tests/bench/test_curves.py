import csv
import json

import pytest

from treepo_async.bench.curves import parse, points_of, table, write
from treepo_async.errors import ConfigError, DataError


def run(folder, accuracies, *, tokens=100, pass_at_k=None):
    """A run that decoded that many tokens a step and was evaluated before and after each."""
    folder.mkdir()
    records = []
    for step, accuracy in enumerate(accuracies):
        if step:
            records.append({"step": step, "tokens/decoded": tokens, "reward/mean": 0.0})
        evaluation = {"eval/sampled_accuracy": accuracy, "eval/greedy_accuracy": 0.25}
        best = {} if pass_at_k is None else {"eval/pass_at_k": pass_at_k}
        records.append({"step": step, **evaluation, **best})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_an_evaluation_has_the_tokens_decoded_until_then(tmp_path):
    points = points_of("tree", run(tmp_path / "a", [0.5, 0.6, 0.7]))
    assert [(p.step, p.decoded_tokens, p.sampled_accuracy) for p in points] == [
        (0, 0, 0.5),
        (1, 100, 0.6),
        (2, 200, 0.7),
    ]


def test_the_table_has_a_row_a_run_and_leaves_open_what_was_not_evaluated(tmp_path):
    long, short = run(tmp_path / "a", [0.5, 0.6, 0.7]), run(tmp_path / "b", [0.4], pass_at_k=0.9)
    text = table([points_of("tree", long), points_of("flat", short)])
    assert text.splitlines()[2:] == [
        "| tree | a | 0.500 | 0.600 | 0.700 |  | 0.25 | 200 |",
        "| flat | b | 0.400 |  |  | 0.90 | 0.25 | 0 |",
    ]


def test_table_points_and_picture_are_written(tmp_path):
    arms = {"tree": [run(tmp_path / "a", [0.5, 0.6])], "flat": [run(tmp_path / "b", [0.5, 0.55])]}
    text = write(arms, tmp_path / "out")
    assert (tmp_path / "out" / "table.md").read_text() == text
    with (tmp_path / "out" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["arm"], r["step"], r["sampled_accuracy"]) for r in rows] == [
        ("tree", "0", "0.5"),
        ("tree", "1", "0.6"),
        ("flat", "0", "0.5"),
        ("flat", "1", "0.55"),
    ]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_arms_are_read_from_words(tmp_path):
    arms, out = parse(["tree=a,b", "flat=c", f"out={tmp_path}"])
    assert {arm: [str(run) for run in runs] for arm, runs in arms.items()} == {
        "tree": ["a", "b"],
        "flat": ["c"],
    }
    assert out == tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["runs/a"], "is not ARM=RUN"),
        (["tree="], "is not ARM=RUN"),
        (["out=x"], "no arm is given"),
        (["tree=a", "out=x,y"], "more than one folder"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(words)


def test_what_is_no_run_or_was_never_evaluated_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tree=.*nowhere: .*metrics\.jsonl is not there"):
        points_of("tree", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no evaluation in"):
        points_of("tree", run(tmp_path / "a", []))
