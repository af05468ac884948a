"""`launch/export.py` on run folders as a run leaves them, judged by transformers and by SGLang."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launch.export import main
from tests.oracle import sequence_logprobs, tiny_qwen2
from treepo_async.config.command_line import parse, to_yaml
from treepo_async.tiny.tokenizer import save_tokenizer
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState
from treepo_async.weights.manifest import TensorInfo
from treepo_async.weights.store import NamedTensor

ROOT = Path(__file__).resolve().parents[2]
IDS = [7, 3, 99, 12, 4, 64, 2]


@pytest.fixture(scope="module")
def models():
    """By step: the weights that the checkpoint of that step has; step 0 is the model the run began with."""
    models = {step: tiny_qwen2(tied=False, seed=step).eval() for step in (0, 10, 20)}
    for model in models.values():
        # SGLang would end a request there
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    return models


@pytest.fixture
def run(models, tmp_path):
    """A run with checkpoints of steps 10 and 20, still at work."""
    initial = tmp_path / "initial"
    models[0].save_pretrained(initial)
    save_tokenizer(initial, 512)
    run = tmp_path / "run"
    run.mkdir()
    config = parse([f"model={initial}", "data=problems.jsonl", f"run_dir={run}"])
    (run / "config.yaml").write_text(to_yaml(config))
    store = CheckpointStore(run / "checkpoints", keep=3)
    for step in (10, 20):
        save(store, f"0.{step}", models[step])
    return run


def save(store, version, model):
    tensors = [
        NamedTensor(name, TensorInfo("F32", tuple(t.shape)), t.numpy().tobytes())
        for name, t in model.state_dict().items()
    ]
    store.save(
        TrainingState(version, 9, "tp1", "00", []), [("weights", tensors), ("exp_avg", tensors)]
    )


def logits(folder):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits


def logits_of(model):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits


def damage(run, version, file="weights.safetensors"):
    path = run / "checkpoints" / version / file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_newest_checkpoint_opens_in_transformers_with_the_logits_of_its_weights(
    run, models, tmp_path, capsys
):
    torch = pytest.importorskip("torch")
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    size = sum(t.numel() for t in models[20].state_dict().values()) * 4
    assert said.out == (
        f"exported policy version 0.20 (step 20) to {tmp_path / 'out'}: 1 file, {size:,} bytes of float32\n"
    )
    assert said.err == ""
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[20]))
    assert not torch.allclose(logits(tmp_path / "out"), logits_of(models[10]), atol=1e-3)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("1+2").input_ids) == "1+2"


def test_a_step_and_a_dtype_can_be_asked_for(run, models, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    words = [str(run), f"hf={tmp_path / 'out'}", "step=10", "dtype=bfloat16"]
    assert main(words) == 0
    assert "policy version 0.10 (step 10)" in capsys.readouterr().out
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, tensor in models[10].state_dict().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


def test_of_a_step_that_was_trained_twice_the_newest_lineage_is_taken(
    run, models, tmp_path, capsys
):
    torch = pytest.importorskip("torch")
    save(CheckpointStore(run / "checkpoints", keep=3), "1.10", models[0])
    assert main([str(run), f"hf={tmp_path / 'out'}", "step=10"]) == 0
    assert "policy version 1.10" in capsys.readouterr().out
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[0]))


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_exported(
    run, models, tmp_path, capsys
):
    torch = pytest.importorskip("torch")
    damage(run, "0.20")
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("passed over: ")
    assert "0.20/weights.safetensors is damaged" in said.err
    assert "policy version 0.10" in said.out
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[10]))


def test_damaged_moments_are_not_looked_at(run, models, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    damage(run, "0.20", "exp_avg.safetensors")
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().err == ""
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[20]))


@pytest.mark.parametrize("moment", ["before it is opened", "before it is copied"])
def test_a_checkpoint_that_the_run_removes_meanwhile_makes_way_for_the_next_newest(
    run, models, tmp_path, capsys, monkeypatch, moment
):
    torch = pytest.importorskip("torch")
    from treepo_async.cluster import export as module

    name = "_check_model" if moment == "before it is opened" else "export"
    work = getattr(module, name)

    def removed_before(checkpoint, *words, **keys):
        if checkpoint.folder.name == "0.20":
            shutil.rmtree(checkpoint.folder)
        return work(checkpoint, *words, **keys)

    monkeypatch.setattr(module, name, removed_before)
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    assert "0.20 was removed while it was read" in capsys.readouterr().err
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[10]))
    assert main([str(run), f"hf={tmp_path / 'other'}", "step=20"]) == 2
    assert "has checkpoints of steps 10" in capsys.readouterr().err


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(run, tmp_path, capsys):
    damage(run, "0.20")
    assert main([str(run), f"hf={tmp_path / 'out'}", "step=20"]) == 1
    assert "0.20/weights.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_whole_checkpoint_nothing_is_exported(run, tmp_path, capsys):
    damage(run, "0.10")
    damage(run, "0.20")
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 1
    assert "none of its 2 checkpoints is whole" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_whose_first_model_has_moved_needs_to_be_told_where(run, models, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    moved = (tmp_path / "initial").rename(tmp_path / "moved")
    words = [str(run), f"hf={tmp_path / 'out'}"]
    assert main(words) == 2
    assert f"model.path={tmp_path / 'initial'} is no folder" in capsys.readouterr().err
    assert main([*words, f"model={moved}"]) == 0
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[20]))


def test_a_run_that_has_ended_is_exported_without_the_model_it_began_with(run, models, tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "initial").rename(run / "model")
    (run / "model" / "policy_version").write_text("0.20\n")
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    assert torch.equal(logits(tmp_path / "out"), logits_of(models[20]))


def test_a_config_of_another_model_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_qwen2(tied=True).save_pretrained(other)
    save_tokenizer(other, 512)
    assert main([str(run), f"hf={tmp_path / 'out'}", f"model={other}"]) == 2
    assert "other is of a model of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["{run}"], "give the folder of one run, and hf=DIR"),
        (["hf=out"], "give the folder of one run, and hf=DIR"),
        (["{run}", "{run}", "hf=out"], "give the folder of one run"),
        (["{run}", "hf=out", "stpe=3"], "unknown key stpe; the keys are hf, step, dtype, model"),
        (["{run}", "hf=out", "step=last"], "step=last is no policy step"),
        (["{run}", "hf=out", "step=7"], "has checkpoints of steps 10, 20"),
        (["{run}", "hf=out", "dtype=int8"], "dtype=int8 is not one of float32, bfloat16"),
        (["{run}/checkpoints", "hf=out"], "has no config.yaml, so it is no run"),
        (["nowhere", "hf=out"], "has no config.yaml, so it is no run"),
        (["{run}", "hf={run}"], "is there already and never overwritten"),
        (["{run}", "hf=out", "model={run}"], "lacks config.json or tokenizer.json"),
    ],
)
def test_what_cannot_be_exported_is_named_and_nothing_written(
    run, tmp_path, capsys, monkeypatch, words, reason
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([word.format(run=run) for word in words]) == 2
    assert reason in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_a_checkpoint_says_when_there_will_be_one(run, tmp_path, capsys):
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_neither_megatron_nor_sglang_is_imported(run, tmp_path):
    code = (
        "import sys; sys.path.insert(0, '.'); from launch.export import main; code = main(sys.argv[1:]);"
        "heavy = {'ray', 'sglang', 'megatron', 'transformers', 'torch'} & set(sys.modules);"
        "print('heavy:', sorted(heavy), 'code:', code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), f"hf={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.stdout.splitlines()[-1] == "heavy: [] code: 0", done.stderr


@pytest.mark.engine
@pytest.mark.timeout(240)
@pytest.mark.asyncio
async def test_sglang_opens_it_and_has_the_log_probs_of_the_exported_weights(run, models, tmp_path):
    import aiohttp

    from treepo_async.engine.server import Server, ServerOptions
    from treepo_async.process import free_ports

    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    options = ServerOptions(
        port=free_ports(1)[0],
        dtype="float32",
        context_length=512,
        max_total_tokens=2048,
        max_running_requests=4,
        prefill_chunk_tokens=512,
        log_file=tmp_path / "sglang.log",
    )
    async with aiohttp.ClientSession() as session:
        server = Server(options, session)
        await server.start(tmp_path / "out", str(PolicyVersion(0, 20)), timeout_s=200)
        try:
            (found,) = await server.score([IDS], timeout_s=30)
        finally:
            await server.stop()
    expected, other = (sequence_logprobs(models[step], IDS).detach().numpy() for step in (20, 10))
    assert np.abs(np.array(found) - expected).max() < 1e-5
    assert np.abs(np.array(found) - other).max() > 1e-2


def test_the_config_says_float32_whatever_the_first_model_was_stored_in(run, tmp_path):
    config_file = tmp_path / "initial" / "config.json"
    config = json.loads(config_file.read_text()) | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    config_file.write_text(json.dumps(config))
    assert main([str(run), f"hf={tmp_path / 'out'}"]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["dtype"] == "float32"
    assert "torch_dtype" not in written
