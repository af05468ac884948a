"""`launch/run.py` up to the start of a run: what a person gets for a good and for a bad command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes import MODEL
from treepo_async.config.schema import Config, knobs
from treepo_async.tiny.tokenizer import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def launched(*words, code=None, cwd=ROOT):
    """Run it as a person does; with `code`, in an interpreter that goes on with that code afterwards."""
    command = [str(ROOT / "launch" / "run.py"), *words]
    if code is not None:
        command = ["-c", code, *words]
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=50
    )


@pytest.fixture
def inputs(tmp_path):
    """Words for a model folder and a data file of one's own, which need no training."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_tokenizer(folder, 256)
    config = MODEL | {"max_position_embeddings": 256, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    data = tmp_path / "problems.jsonl"
    lines = [json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) for i in range(20)]
    data.write_text("\n".join(lines))
    return [f"model={folder}", f"data={data}", "data.instruction=''", "tree.max_depth=3"]


def test_a_misspelled_key_ends_with_2_and_the_right_one_without_a_traceback():
    done = launched("actrs=8")
    assert done.returncode == 2
    assert done.stderr == "error: actrs=8: unknown key actrs; did you mean actors?\n"
    assert done.stdout == ""


def test_a_combination_that_cannot_be_run_ends_with_2_and_every_reason():
    done = launched("tree.first_fork_min=4", "learner=tp2xp2", "actors=0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: actors=0 must be at least 1\n")
    for reason in ("tree.first_fork_min=4", "learner.layout='tp2xp2' is not a layout"):
        assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_exist_ends_with_2(tmp_path):
    done = launched("model=nowhere", "data=tiny.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.path=nowhere is no folder")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_key_and_imports_nothing_heavy():
    code = (
        "import sys; sys.path.insert(0, '.'); from launch.run import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'ray', 'sglang', 'megatron', 'transformers', 'zmq'} & set(sys.modules);"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = launched("--help", code=code)
    *text, last = done.stdout.splitlines()
    assert last == "heavy: [] code: 0"
    assert "[--dry-run [--gpu-gib=80] [--nodes=4x8]]" in text[0]
    for key, _ in knobs(Config):
        assert any(line.startswith(f"  {key}=") for line in text), key


def test_a_dry_run_prints_the_plan_and_leaves_nothing(inputs, tmp_path):
    run_dir = tmp_path / "run"
    done = launched(*inputs, "actors=3", "steps=7", f"run_dir={run_dir}", "--dry-run")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert "1 engine, 1 learner, 1 replay, 3 actor" in text
    assert "16 trees x 16 leaves = 256 trajectories a step, 7 steps, staleness at most 1" in text
    assert "segments of 10 x depth 3, responses up to 30 tokens" in text
    assert not run_dir.exists()


def test_a_dry_run_for_gpus_says_what_they_must_hold_and_imports_neither_torch_nor_ray(inputs):
    code = (
        "import sys; sys.path.insert(0, '.'); from launch.run import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'ray', 'sglang', 'megatron', 'transformers'} & set(sys.modules);"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = launched(*inputs, "learner=tp2pp2", "--dry-run", "--gpu-gib=24", code=code)
    *text, last = done.stdout.splitlines()
    assert last == "heavy: [] code: 0", done.stderr
    assert any("estimate in GiB for GPUs of 24 GiB" in line for line in text)
    assert any("5 GPUs: 4 for ranks, 1 for engines" in line for line in text)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--dry-run", "--gpu-gib=much"], "--gpu-gib=much is no memory of a GPU in GiB"),
        (["--gpu-gib=80"], "--gpu-gib=... is for --dry-run"),
        (["--dry-run=true"], "--dry-run=true: unknown key --dry-run"),
        (["--dry-run", "learner=tp3"], "not a multiple of the learner's tp=3"),
    ],
)
def test_a_dry_run_that_makes_no_sense_ends_with_2(inputs, words, reason):
    done = launched(*inputs, *words)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stdout == ""


def test_a_folder_that_holds_a_run_is_not_written_to_where_it_shall_not_be_resumed(
    inputs, tmp_path
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("steps: 1\n")
    done = launched(*inputs, f"run_dir={run_dir}", "resume=false", "--dry-run")
    assert done.returncode == 2
    assert f"error: run_dir={run_dir} holds a run already" in done.stderr
    assert (run_dir / "config.yaml").read_text() == "steps: 1\n"


def test_a_line_that_the_console_does_not_take_ends_nothing():
    code = (
        "import sys; sys.path.insert(0, '.'); from launch.run import say\n"
        "sys.stdout = open('/dev/full', 'w')\n"
        "say('a' * 9000); say('b')\n"
        "sys.stdout = sys.__stdout__; say('on it goes')"
    )
    done = launched(code=code)
    assert "on it goes" in done.stdout, done.stderr
