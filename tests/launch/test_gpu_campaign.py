"""launch/gpu_campaign.sh, rehearsed without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def launched(*words, out, timeout_s=100):
    return subprocess.run(
        ["bash", "launch/gpu_campaign.sh", *words],
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
    assert "sees no CUDA device; bash launch/gpu_campaign.sh --cpu rehearses" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_rehearsal_checks_attention_and_leaves_its_results(tmp_path):
    done = launched("--cpu", "exactness", out=tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("\n2 passed\n")
    for dtype in ("float32", "bfloat16"):
        written = json.loads((tmp_path / f"attention_exactness-{dtype}.json").read_text())
        assert (written["backend"], written["passed"]) == ("cascade", True)
        assert {row["dtype"] for row in written["rows"]} == {dtype}
    assert "## attention_exactness-bfloat16" in (tmp_path / "campaign.md").read_text()


@pytest.mark.slow
def test_the_rehearsal_measures_learner_and_weights_and_compares_devices(tmp_path):
    done = launched("--cpu", "step", "learner", "profile", "weights", out=tmp_path, timeout_s=400)
    assert done.returncode == 0, done.stdout
    page = (tmp_path / "campaign.md").read_text()
    for part in ("device_step", "learner-cpu", "profile-cpu", "weight_path-cpu"):
        assert f"## {part}" in page


def test_what_attention_is_checked_with_needs_torch_and_numpy_alone():
    code = (
        "import sys, treepo_async.bench.attention; "
        "print({'megatron', 'msgspec', 'zmq', 'ray', 'transformers', 'omegaconf', 'safetensors', 'psutil'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"
