"""launch/gpu_check.sh, rehearsed without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def launched(*words, out, timeout_s=55):
    return subprocess.run(
        ["bash", "launch/gpu_check.sh", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(out)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_ends_with_2_and_the_way_out(tmp_path):
    done = launched(out=tmp_path / "out")
    assert done.returncode == 2
    assert "sees no CUDA device; bash launch/gpu_check.sh --cpu rehearses" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_wrong_word_ends_with_2_and_its_name(tmp_path):
    done = launched("--cpu", "speed", out=tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "speed is no part; the parts are exactness, memory, learner" in done.stderr


def test_the_rehearsal_checks_attention_and_leaves_its_results(tmp_path):
    done = launched("--cpu", "exactness", "memory", out=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "all passed in" in (tmp_path / "check.txt").read_text()
    for part in ("exactness", "memory"):
        written = json.loads((tmp_path / f"attention_{part}.json").read_text())
        assert (written["backend"], written["passed"]) == ("cascade", True)


def test_a_failed_part_is_named_and_the_next_runs_all_the_same(tmp_path):
    (tmp_path / "attention_exactness.json").mkdir()  # cannot be written over
    done = launched("--cpu", "exactness", "memory", out=tmp_path)
    assert done.returncode == 1
    assert done.stdout.endswith("failed: exactness\n")
    assert (tmp_path / "attention_memory.json").is_file()


@pytest.mark.engine
def test_the_rehearsal_measures_a_learner(tmp_path):
    done = launched("--cpu", "learner", out=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "== learner cpu passed" in done.stdout
    first = (tmp_path / "learner-cpu" / "samples.csv").read_bytes()
    again = launched("--cpu", "learner", out=tmp_path)
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("round 1") == 1
    assert (tmp_path / "learner-cpu-2" / "samples.csv").is_file()
    assert (tmp_path / "learner-cpu" / "samples.csv").read_bytes() == first


def test_what_attention_is_checked_with_needs_torch_and_numpy_alone():
    code = (
        "import sys, treepo_async.bench.attention; "
        "print({'megatron', 'msgspec', 'zmq', 'ray', 'transformers', 'omegaconf', 'safetensors', 'psutil'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
