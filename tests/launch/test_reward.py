"""`launch/reward.py` with real scoring processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.reward import COLUMNS, main, other_than
from treepo_async.scoring.exact import exact
from treepo_async.scoring.maths import maths

ROOT = Path(__file__).resolve().parents[2]
OBEY = "reward.scorer=tests.scoring.scorers:obey"


def lines_of(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture
def data(tmp_path):
    answers = ["18", "\\frac{1}{2}", "so it is 3\n#### 3", "x+1", "1,000", "70"]
    records = [{"question": f"What is\n{a}?", "answer": a} for a in answers]
    return f"data={lines_of(tmp_path / 'problems.jsonl', records)}"


def tried(capsys, *words):
    """Exit code, rows of the table by column, last line, and standard error."""
    code = main(list(words))
    captured = capsys.readouterr()
    out = captured.out.splitlines()
    rows = []
    for line in out[1:-1]:
        cells, start = {}, 0
        for name, width in COLUMNS:
            cells[name] = line[start : start + width].strip()
            start += width + 1
        time_text, _, error = line[start:].strip().partition("  ")
        assert time_text.endswith("ms")
        rows.append(cells | {"error": error})
    return code, rows, out[-1] if out else "", captured.err


@pytest.mark.parametrize("scorer", ["math", "exact"])
def test_own_answers_are_right_and_other_ones_wrong_on_the_first_five_records(capsys, data, scorer):
    code, rows, verdict, _ = tried(capsys, f"reward.scorer={scorer}", data)
    assert code == 0
    assert verdict == "own answers right: 5/5, wrong answers wrong: 5/5, errors: 0"
    assert [row["score"] for row in rows] == ["1", "0", "0"] * 5
    assert [row["reward"] for row in rows] == ["1", "-1", "-1"] * 5
    assert rows[0] == {
        "question": "What is 18?",
        "response": "\\boxed{18}",
        "answer key": "18",
        "score": "1",
        "reward": "1",
        "error": "",
    }
    assert [row["response"] for row in rows[1:3]] == ["\\boxed{19}", ""]
    assert [row["response"] for row in rows[6:8]] == ["\\boxed{3}", "\\boxed{4}"]


def test_the_built_in_task_is_tried_by_default(capsys):
    code, rows, verdict, _ = tried(capsys, "n=2")
    assert (code, len(rows)) == (0, 6)
    assert verdict == "own answers right: 2/2, wrong answers wrong: 2/2, errors: 0"


def test_given_responses_are_scored_instead_and_errors_are_shown_and_end_with_1(capsys, tmp_path):
    responses = ["bool", "raise", "scalar", "os._exit", "outside"]
    records = [{"response": r, "answer": "1"} for r in responses]
    file = lines_of(tmp_path / "responses.jsonl", records)
    code, rows, verdict, _ = tried(capsys, OBEY, f"responses={file}")
    assert code == 1
    assert [row["score"] for row in rows] == ["1", "-", "0.5", "-", "-3"]
    assert [row["reward"] for row in rows] == ["1", "-", "0", "-", "-7"]
    assert [row["error"] for row in rows] == [
        "",
        "raised: LookupError: no such answer",
        "",
        "died: its process ended with exit code 3",
        "",
    ]
    assert verdict == "right: 1/5, wrong: 0/5, errors: 2 (raised 1, died 1)"


def test_a_key_that_cannot_be_read_is_a_reward_error(capsys, tmp_path):
    data = lines_of(tmp_path / "bad.jsonl", [{"question": "q", "answer": "???"}])
    code, rows, verdict, _ = tried(capsys, "reward.scorer=math", f"data={data}")
    assert code == 1
    assert rows[0]["error"].startswith("bad_key: answer key '???' cannot be read")
    assert verdict == "own answers right: 0/1, wrong answers wrong: 0/1, errors: 3 (bad key 3)"


def test_the_overlong_penalty_is_shown_in_the_reward_alone(capsys):
    words = ["n=1", "tree.segment_tokens=3", "tree.max_depth=1"]
    shaped = [*words, "reward.overlong_tokens=2", "reward.overlong_penalty=0.5"]
    _, plain, _, _ = tried(capsys, *words)
    _, rows, _, _ = tried(capsys, *shaped)
    # `\boxed{`, a digit and `}` are three tokens of the tiny model, the limit here
    assert [row["reward"] for row in plain] == ["1", "-1", "-1"]
    assert [row["reward"] for row in rows] == ["0.5", "-1.5", "-1"]
    assert [row["score"] for row in rows] == ["1", "0", "0"]


def test_records_that_cannot_be_used_are_passed_over_and_told(capsys, tmp_path):
    records = [{"question": "", "answer": "1"}, {"question": "q", "answer": "2"}]
    file = lines_of(tmp_path / "some.jsonl", records)
    code, rows, _, err = tried(capsys, f"data={file}")
    assert (code, len(rows)) == (0, 3)
    assert f"skipped: {file} record 1: field 'question' is empty" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reward.scorer=mth"], "did you mean math"),
        (["reward.scorer=no_such_module_here:f"], "cannot be imported"),
        (["reward.scorr=exact"], "did you mean reward.scorer"),
        (["n=0"], "n=0 must be a whole number above 0"),
        (["n=many"], "n=many must be a whole number above 0"),
        (["data=missing.jsonl"], "missing.jsonl does not exist"),
        (["responses=missing.jsonl"], "responses=missing.jsonl does not exist"),
        (
            ["data=x.jsonl", "model=nowhere", "reward.overlong_tokens=3"],
            "model.path=nowhere is no folder",
        ),
    ],
)
def test_what_cannot_be_tried_ends_with_2_and_the_reason(
    capsys, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"question": "q", "answer": "1"}\n')
    code, _, out, err = tried(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize("line", ["{", "[]", '{"response": "x"}', '"text"'])
def test_a_line_that_is_no_response_is_named(capsys, tmp_path, line):
    file = tmp_path / "responses.jsonl"
    file.write_text(f'{{"response": "x", "answer": "1"}}\n{line}\n')
    code, _, _, err = tried(capsys, f"responses={file}")
    assert code == 2
    assert f"responses={file} line 2 is not" in err


def test_only_line_feeds_end_a_response(capsys, tmp_path):
    file = tmp_path / "responses.jsonl"
    text = json.dumps({"response": "a\u2028b\x85 #### 1", "answer": "1"}, ensure_ascii=False)
    file.write_bytes(text.encode() + b"\r\n\n")
    code, rows, _, err = tried(capsys, f"responses={file}")
    assert (code, len(rows), err) == (0, 1, "")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; write a line"),
        (b"\n \n", "is empty; write a line"),
        (b'\n{"response": "\xff", "answer": "1"}\n', "line 2 is not UTF-8 (invalid start byte"),
    ],
)
def test_a_file_without_responses_that_can_be_read_ends_with_2(capsys, tmp_path, content, message):
    file = tmp_path / "responses.jsonl"
    file.write_bytes(content)
    code, _, out, err = tried(capsys, f"responses={file}")
    assert (code, out) == (2, "")
    assert f"error: responses={file} {message}" in err


@pytest.mark.parametrize(
    "answer", ["18", "-1", "0.5", "1,000", "\\frac{1}{2}", "x+1", "Monday", "(1, 2)"]
)
def test_the_wrong_answer_is_wrong(answer):
    wrong = f"\\boxed{{{other_than(answer)}}}"
    assert exact(wrong, answer) == 0.0
    assert maths(wrong, answer) == 0.0


def test_a_person_calls_it_from_any_folder_with_a_scorer_of_that_folder(tmp_path):
    (tmp_path / "my_rules.py").write_text(
        "def score(response, answer):\n    return answer in response\n"
    )
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "reward.py", "reward.scorer=my_rules:score", "n=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1]
        == "own answers right: 1/1, wrong answers wrong: 1/1, errors: 0"
    )
    assert done.stderr == ""


def test_help_says_how_it_is_called(capsys):
    assert main(["--help"]) == 0
    assert "launch/reward.py [reward.scorer=NAME]" in capsys.readouterr().out
