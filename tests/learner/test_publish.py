import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.oracle import random_tree
from treepo_async.learner.publish import (
    PROBE_SEQUENCES,
    PROBE_TOKENS,
    named_tensors,
    probe_sequences,
    publish,
)
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import verify
from treepo_async.weights.store import WeightStore

VERSION = PolicyVersion(0, 1)


class Policy:
    """Two tensors, one of them a transposed view, and log-probs that tell their place."""

    tensors = {
        "model.norm.weight": torch.tensor([1.0, -2.5, 3e-8]),
        "lm_head.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).T,
    }

    def export(self):
        yield from self.tensors.items()

    def score(self, sequences):
        return [np.arange(1, len(s), dtype=np.float32) * -0.25 for s in sequences]


@pytest.fixture
def trees():
    rng = np.random.default_rng(0)
    return [random_tree(rng) for _ in range(PROBE_SEQUENCES + 2)]


def publish_to(tmp_path, trees, dtype=torch.float32):
    config_file = tmp_path / "config.json"
    config_file.write_text('{"vocab_size": 128}')
    store = WeightStore(tmp_path / "weights", keep=2)
    return publish(
        store,
        Policy(),
        VERSION,
        probe_sequences(trees),
        dtype=dtype,
        config_file=config_file,
        evaluate=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_published_bytes_are_the_tensors(tmp_path, trees, dtype):
    folder = publish_to(tmp_path, trees, dtype)
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == Policy.tensors.keys()
    for name, tensor in Policy.tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor.to(dtype))
    assert json.loads((folder / "config.json").read_text()) == {"vocab_size": 128}


def test_a_publication_passes_its_own_check_and_carries_its_probe(tmp_path, trees):
    folder = publish_to(tmp_path, trees)
    expected = {t.name: t.info for t in named_tensors(Policy.tensors.items(), torch.float32)}
    manifest = verify(folder, expected)
    assert (manifest.version, manifest.evaluate) == ("0.1", True)
    assert len(manifest.probe.token_ids) == PROBE_SEQUENCES
    for ids, logprobs in zip(manifest.probe.token_ids, manifest.probe.logprobs, strict=True):
        assert logprobs == [-0.25 * i for i in range(1, len(ids))]


def test_the_probe_is_the_end_of_the_first_trajectory_of_the_first_trees(trees):
    sequences = probe_sequences(trees)
    assert len(sequences) == PROBE_SEQUENCES
    for tree, sequence in zip(trees, sequences, strict=False):
        path = tree.path(tree.leaves[0])
        response = [t for i in path for t in tree.segments[i].token_ids.tolist()]
        whole = [*tree.prompt.token_ids.tolist(), *response]
        assert sequence.tolist() == whole[-PROBE_TOKENS:]


def test_a_long_probe_is_cut():
    tree = random_tree(np.random.default_rng(2), segment_tokens=1000, num_segments=1)
    assert tree.num_tokens > PROBE_TOKENS
    assert len(probe_sequences([tree])[0]) == PROBE_TOKENS


def test_fewer_trees_make_a_shorter_probe(trees):
    assert len(probe_sequences(trees[:1])) == 1
