"""A learner without files."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.learner.shares import share_of
from tests.oracle import random_tree
from treepo_async.learner.shape import ModelShape

pytestmark = pytest.mark.engine

SHAPE = ModelShape(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rope_theta=1e4,
    norm_epsilon=1e-6,
    max_position_embeddings=512,
    tied=False,
    qk_norm=True,
)

WITHOUT_LIBRARIES = """
import sys

class Absent:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from treepo_async.learner.build import build_dummy
from treepo_async.learner.step import Learner
"""
ABSENT = {"aiohttp", "msgspec", "omegaconf", "pyarrow", "ray", "safetensors", "sglang", "tensorboard"} | {
    "tokenizers", "transformers", "yaml", "zmq", "math_verify", "jinja2",
}  # fmt: skip


def share():
    rng = np.random.default_rng(2)
    trees = [random_tree(rng) for _ in range(3)]
    return share_of(trees, [rng.normal(size=len(tree.leaves)) for tree in trees])


@pytest.mark.usefixtures("groups")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dummy_learner_learns_and_is_the_same_for_the_same_seed(dtype):
    from treepo_async.learner.build import build_dummy

    first, again, other = (build_dummy(SHAPE, seed=seed, dtype=dtype) for seed in (1, 1, 2))
    results = [learner.train(share()) for learner in (first, again, other)]
    assert results[0].loss == results[1].loss != results[2].loss
    assert results[0].grad_norm > 0
    weights = dict(first.export())
    assert 0.015 < weights["model.layers.1.mlp.up_proj.weight"].std() < 0.025


@pytest.mark.usefixtures("groups")
def test_settings_of_the_model_are_passed_on():
    from treepo_async.learner.build import build_dummy
    from treepo_async.learner.loss.objective import LossSettings

    loss = LossSettings(entropy_coef=0.1)
    learner = build_dummy(SHAPE, loss=loss, head_tokens=3, recompute="full", with_reference=True)
    assert learner.model.module.head_tokens == 3
    assert learner.model.module.with_entropy_gradient
    assert learner.model.module.config.recompute_granularity == "full"
    assert not any(weight.requires_grad for weight in learner.reference.parameters())
    assert build_dummy(SHAPE).reference is None
    assert not build_dummy(SHAPE).model.module.with_entropy_gradient


def run(program):
    return subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True)


def test_it_needs_no_library_but_torch_numpy_and_megatron():
    program = WITHOUT_LIBRARIES.format(absent=ABSENT)
    done = run(program)
    assert done.returncode == 0, done.stderr.decode()
    assert b"safetensors" in run(program + "import treepo_async.learner.model.hf_files").stderr
