"""Weights in and out, of one rank and of several."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.ranks import Ranks
from tests.oracle import tiny_model
from treepo_async.config.layout import Layout
from treepo_async.errors import ConfigError

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups"), pytest.mark.timeout(120)]

SPLIT_FAMILIES = ("qwen2", "qwen3", "llama")
LAYOUTS = ("tp1", "tp2", "pp2", "tp4pp2")
KINDS = [f"{family}-{kind}" for family in SPLIT_FAMILIES for kind in ("untied", "tied")]


def shape_of(model_dir):
    from treepo_async.learner.shape import ModelShape

    return ModelShape.from_config(json.loads((model_dir / "config.json").read_text()))


def round_trip(model_dir):
    from treepo_async.learner.model.gpt import build_model
    from treepo_async.learner.model.hf import export, load
    from treepo_async.learner.model.hf_files import open_checkpoint

    shape = shape_of(model_dir)
    model = build_model(shape)
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
    from treepo_async.learner.model.gpt import build_model
    from treepo_async.learner.model.hf import export, load

    def gradient(weight):
        return weight.main_grad

    original, shape = load_file(model_dir / "model.safetensors"), shape_of(model_dir)
    model = build_model(shape)
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
    with pytest.raises(ConfigError, match=r"model\.norm.*\[1\].*\[64\]"):
        round_trip(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    from treepo_async.learner.model.hf_files import open_checkpoint

    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


def test_a_tensor_larger_than_promised_is_refused_rather_than_cut(model_dir, tmp_path):
    tensors = load_file(model_dir / "model.safetensors")
    tensors["model.embed_tokens.weight"] = torch.ones(256, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight.*\[256, 64\].*\[128, 64\]"):
        round_trip(tmp_path)


def test_dummy_weights_follow_from_the_seed_alone(model_dir):
    from treepo_async.learner.model.hf import dummy
    from treepo_async.learner.model.names import tensor_sizes

    shape = shape_of(model_dir)
    names = list(tensor_sizes(shape))
    first, again, other = ({name: dummy(shape, seed)(name) for name in names} for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in names)
    matrices = [name for name in names if first[name].dim() == 2]
    assert not any(torch.equal(first[name], other[name]) for name in matrices)
    assert len({first[name].sum().item() for name in matrices}) == len(matrices)


@dataclass(frozen=True)
class Case:
    layout: Layout
    folder: Path
    """Has one model folder for each of `KINDS`."""


class Parts:
    """A tensor of a file that notes how many numbers of it are read."""

    def __init__(self, tensor, read):
        self.tensor, self.read = tensor, read

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        part = self.tensor[index]
        self.read.append(part.numel())
        return part


def through_a_layout(case):
    """What each rank does: read and write each model."""
    for kind in KINDS:
        read_and_write(case.folder / kind, case.folder / f"{kind}-{case.layout}")


def read_and_write(source, written):
    """Rank 0 writes a folder that transformers can open."""
    from treepo_async.learner.model.gpt import build_model
    from treepo_async.learner.model.hf import export, load
    from treepo_async.learner.model.hf_files import open_checkpoint

    shape, read, num_read = shape_of(source), open_checkpoint(source), []
    model = build_model(shape)
    load(model, shape, lambda name: Parts(read(name)[:], num_read))
    # a share of each tensor was read, of norms the whole, and nothing twice
    assert sum(num_read) == sum(weight.numel() for weight in model.parameters())
    load(model, shape, read)
    tensors = {name: tensor.clone() for name, tensor in export(model, shape)}
    if tensors:
        written.mkdir()
        save_file(tensors, written / "model.safetensors", {"format": "pt"})
        (written / "config.json").write_text((source / "config.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        family, _, tied = kind.partition("-")
        # of tp4, two ranks share a key-value head
        model = tiny_model(family, tied=tied == "tied", num_heads=8, num_kv_heads=2)
        model.save_pretrained(found / kind)
    cases = [Case(Layout.parse(layout), found) for layout in LAYOUTS]
    Ranks(through_a_layout, cases, deadline_s=100).wait()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_family_comes_back_bit_for_bit_through_any_layout(folder, kind, layout):
    original = load_file(folder / kind / "model.safetensors")
    returned = load_file(folder / f"{kind}-{layout}" / "model.safetensors")
    assert returned.keys() == original.keys()
    assert all(torch.equal(returned[name], tensor) for name, tensor in original.items())
    assert len({tensor.sum().item() for tensor in original.values()}) == len(original)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_what_comes_back_and_computes_the_same(folder, kind, layout):
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    returned, original = (
        AutoModelForCausalLM.from_pretrained(folder / name)(ids).logits
        for name in (f"{kind}-{layout}", kind)
    )
    assert torch.equal(returned, original)
    assert not math.isclose(original.std().item(), 0.0, abs_tol=1e-3)
