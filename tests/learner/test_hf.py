"""Weights in and out."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from treepo_async.errors import ConfigError

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]


def shape_of(model_dir):
    from treepo_async.learner.shape import ModelShape

    return ModelShape.from_config(json.loads((model_dir / "config.json").read_text()))


def round_trip(model_dir):
    from treepo_async.learner.hf import export, load, open_checkpoint
    from treepo_async.learner.model import build_model

    shape = shape_of(model_dir)
    model = build_model(shape, sequence_parallel=False)
    load(model, shape, open_checkpoint(model_dir))
    return dict(export(model, shape))


def split_in_two(tensors, path):
    """The same checkpoint as two files with an index."""
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_every_tensor_comes_back_bit_for_bit(model_dir):
    original = load_file(model_dir / "model.safetensors")
    returned = round_trip(model_dir)
    assert returned.keys() == original.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in original.items())
    assert all(tensor.is_contiguous() for tensor in returned.values())


def test_what_stands_at_a_parameter_goes_the_same_way(model_dir):
    from treepo_async.learner.hf import export, load
    from treepo_async.learner.model import build_model

    def gradient(weight):
        return weight.main_grad

    original, shape = load_file(model_dir / "model.safetensors"), shape_of(model_dir)
    model = build_model(shape, sequence_parallel=False)
    load(model, shape, original.__getitem__)
    load(model, shape, lambda name: -original[name], gradient)
    for sign, tensors in ((1, export(model, shape)), (-1, export(model, shape, gradient))):
        returned = dict(tensors)
        assert returned.keys() == original.keys()
        assert all(torch.equal(returned[name], sign * original[name]) for name in original)


def test_a_checkpoint_in_several_files_is_read_through_its_index(model_dir, tmp_path):
    original = load_file(model_dir / "model.safetensors")
    split_in_two(original, tmp_path)
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    returned = round_trip(tmp_path)
    assert all(torch.equal(returned[name], tensor) for name, tensor in original.items())


def test_a_missing_tensor_is_named(model_dir, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        round_trip(tmp_path)


def test_a_tensor_of_another_shape_is_refused_rather_than_broadcast(model_dir, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"final_layernorm.*\[1\].*\[64\]"):
        round_trip(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    from treepo_async.learner.hf import open_checkpoint

    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)
