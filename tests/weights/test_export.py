import json

import numpy as np
import pytest
from safetensors.numpy import load_file as load_numpy

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights import export as module
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState
from treepo_async.weights.export import export, to_bfloat16
from treepo_async.weights.manifest import TensorInfo, read_tensors
from treepo_async.weights.store import NamedTensor

RNG = np.random.default_rng(0)
ARRAYS = {
    "model.embed_tokens.weight": RNG.normal(size=(64, 8)).astype(np.float32),
    "model.norm.weight": RNG.normal(size=8).astype(np.float32),
    "lm_head.weight": RNG.normal(size=(64, 8)).astype(np.float32),
}


@pytest.fixture
def checkpoint(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    tensors = [
        NamedTensor(name, TensorInfo("F32", a.shape), a.tobytes()) for name, a in ARRAYS.items()
    ]
    store.save(TrainingState("0.10", 9, "tp1", "00", []), [("weights", tensors)])
    return store.at(PolicyVersion(0, 10))


@pytest.fixture
def model_dir(tmp_path):
    folder = tmp_path / "initial"
    folder.mkdir()
    files = {
        "config.json": {"architectures": ["Qwen2ForCausalLM"], "torch_dtype": "float16"},
        "generation_config.json": {"eos_token_id": [1, 2]},
        "tokenizer.json": {"model": "t"},
        "model.safetensors.index.json": {"weight_map": {"old": "old.safetensors"}},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").write_bytes(b"old")
    return folder


def test_the_folder_has_the_weights_of_the_checkpoint_and_the_rest_of_the_model(
    checkpoint, model_dir, tmp_path
):
    done = export(checkpoint, model_dir, tmp_path / "deep" / "out", dtype="float32")
    assert (done.folder, str(done.version), done.num_files) == (tmp_path / "deep/out", "0.10", 1)
    assert done.num_bytes == sum(a.nbytes for a in ARRAYS.values())
    assert {file.name for file in done.folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors",
        "policy_version",
    }
    found = load_numpy(done.folder / "model.safetensors")
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
    config = json.loads((done.folder / "config.json").read_text())
    assert config == {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}
    assert json.loads((done.folder / "generation_config.json").read_text())["eos_token_id"] == [
        1,
        2,
    ]
    assert (done.folder / "policy_version").read_text() == "0.10\n"
    assert [f.name for f in done.folder.parent.iterdir()] == ["out"]


def test_bfloat16_is_rounded_as_torch_rounds(checkpoint, model_dir, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    done = export(checkpoint, model_dir, tmp_path / "out", dtype="bfloat16")
    found = load_file(done.folder / "model.safetensors")
    for name, array in ARRAYS.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], torch.from_numpy(array).to(torch.bfloat16))
    assert done.num_bytes == sum(a.nbytes for a in ARRAYS.values()) // 2
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_every_kind_of_number_is_rounded_as_torch_rounds_it():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    # ties, the largest finite number, infinities, zeros, subnormal numbers, NaN of which rounding would make an infinity
    special = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0, 1 << 31]
    special += [1, 0x80000001, 0x00008000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000]
    values = np.concatenate([bits, np.array(special, np.uint32)]).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = to_bfloat16(values)
    nan = np.isnan(values)
    np.testing.assert_array_equal(found[~nan], expected[~nan])
    assert nan.any()
    assert np.isnan((found[nan].astype(np.uint32) << 16).view(np.float32)).all()
    truncated = (values.view(np.uint32) >> 16).astype(np.uint16)
    assert (truncated[~nan] != expected[~nan]).any()


def test_tensors_larger_than_a_block_are_converted_alike(
    checkpoint, model_dir, tmp_path, monkeypatch
):
    whole = export(checkpoint, model_dir, tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 7)
    blocks = export(checkpoint, model_dir, tmp_path / "blocks", dtype="bfloat16")
    files = [done.folder / "model.safetensors" for done in (whole, blocks)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(("limit", "num_files"), [(64 * 8 * 4, 3), (64 * 8 * 4 + 32, 2), (10, 3)])
def test_what_is_larger_than_a_shard_is_split_and_has_an_index(
    checkpoint, model_dir, tmp_path, limit, num_files
):
    done = export(checkpoint, model_dir, tmp_path / "out", dtype="float32", shard_bytes=limit)
    names = [f"model-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)]
    assert sorted(f.name for f in done.folder.glob("*.safetensors")) == names
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.num_bytes
    assert index["weight_map"].keys() == ARRAYS.keys()
    for name, file in index["weight_map"].items():
        assert read_tensors(done.folder / file)[name].shape == ARRAYS[name].shape
    found = {n: a for name in names for n, a in load_numpy(done.folder / name).items()}
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_folder_that_is_there_is_never_touched(checkpoint, model_dir, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="out is there already"):
        export(checkpoint, model_dir, tmp_path / "out", dtype="float32")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_that_fails_leaves_nothing_and_what_a_killed_one_left_is_no_hindrance(
    checkpoint, model_dir, tmp_path
):
    (model_dir / "config.json").rename(model_dir / "config.kept")
    with pytest.raises(FileNotFoundError):
        export(checkpoint, model_dir, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))
    (model_dir / "config.kept").rename(model_dir / "config.json")
    (tmp_path / ".out.export").mkdir()
    (tmp_path / ".out.export" / "left.json").write_text("{}")
    done = export(checkpoint, model_dir, tmp_path / "out", dtype="float32")
    assert not (done.folder / "left.json").exists()
    assert not list(tmp_path.glob(".*"))
