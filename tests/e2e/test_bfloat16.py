"""A whole run in bfloat16: the real SGLang samples, Megatron-Core keeps float32 master weights."""

import json

import pytest

from treepo_async.weights.manifest import read_tensors

STEPS = 2
RUN_S = 200
WORDS = (f"steps={STEPS}", "eval.every=0", "actors=1", "tree.width=8", "replay.prompts_per_batch=4")

pytestmark = [pytest.mark.engine, pytest.mark.timeout(RUN_S + 30)]


@pytest.fixture(scope="module")
def run(launch):
    started = launch(*WORDS, "model.dtype=bfloat16", "checkpoint.every=1")
    assert started.wait(timeout_s=RUN_S) == 0, str(started)
    return started


def dtypes(file):
    return {info.dtype for info in read_tensors(file).values()}


def test_engine_and_learner_differ_by_what_bfloat16_rounds(run):
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    gaps = [step[f"gap/{kind}_max"] for step in steps for kind in ("probe", "sampled")]
    gaps = [gap for gap in gaps if gap is not None]
    assert len(gaps) >= STEPS
    assert 1e-4 < max(gaps) < 0.5
    assert not any("ALARM" in line for line in run.lines)


def test_the_model_is_bfloat16_and_what_the_run_goes_on_from_float32(run):
    assert dtypes(run.run_dir / "model" / "model.safetensors") == {"BF16"}
    assert json.loads((run.run_dir / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    files = list(run.run_dir.glob("checkpoints/*/*.safetensors"))
    assert len(files) >= 3
    assert all(dtypes(file) == {"F32"} for file in files)
