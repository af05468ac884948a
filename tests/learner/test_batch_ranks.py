"""Whole batches over several ranks, all that rank 0 asks of them included: the same weights as on one rank."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.learner.ranks import GROUP_TIMEOUT_S, Ranks
from tests.oracle import random_tree, tiny_qwen2
from treepo_async.config.layout import Layout
from treepo_async.types import PolicyVersion

pytestmark = [pytest.mark.engine, pytest.mark.timeout(150)]

LAYOUTS = ("tp1", "dp2", "dp4", "tp2pp2", "pp2dp2")
NUM_TREES, NUM_BATCHES = 4, 2
VERSION = PolicyVersion(1, 5)


@dataclass(frozen=True)
class Case:
    layout: Layout
    folder: Path
    spoil: str = ""
    """What to do wrong."""

    @property
    def file(self):
        return self.folder / f"{self.layout}{self.spoil}.safetensors"


def batches():
    """Each with a tree of a single trajectory: an update of it alone leaves most replicas without any."""
    rng = np.random.default_rng(12)
    for _ in range(NUM_BATCHES):
        trees = [random_tree(rng, num_segments=n, temperature=0.9) for n in (1, 9, 12, 6)]
        yield trees[:NUM_TREES]


def train(case):
    """What each rank does; rank 0 writes the weights."""
    from treepo_async.learner.batch import BatchRules, BatchTrainer
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.control import Control
    from treepo_async.learner.loss.mask import MaskRules
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings
    from treepo_async.learner.team import Team

    learner = build_learner(
        case.folder / "model",
        optimizer=OptimizerSettings(learning_rate=2e-3, epsilon=1e-2),
        loss=LossSettings(
            proximal="recomputed",
            kl_coef=0.0 if case.spoil else 0.3,
            mask=MaskRules(names=("m2po",)),
        ),
        microbatch_tokens=40,
        seed=3,
        with_reference=True,
    )
    learner.packing = "auto"
    team = Team(learner, Control(timeout_s=GROUP_TIMEOUT_S))
    if torch.distributed.get_rank() > 0:
        team.follow()
        return
    rules = BatchRules(
        "treepo",
        whiten=False,
        num_minibatches=NUM_TREES,
        needs_proximal=True,
        needs_reference=True,
        needs_bounds=True,
        mean_square=0.5,
        vtrace_cap=1.0,
    )
    trainer = BatchTrainer(team, rules)
    results = [trainer.train(trees, version=VERSION) for trees in batches()]
    tensors = {name: tensor.clone() for name, tensor in team.export()}
    team.stop()
    told = [r.loss for r in results] + [r.masked_share for r in results]
    save_file(tensors | {"told": torch.tensor(told)}, case.file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("batches")
    tiny_qwen2(tied=True, num_layers=2).save_pretrained(found / "model")
    cases = [Case(Layout.parse(layout), found) for layout in LAYOUTS]
    Ranks(train, [*cases, Case(Layout(), found, spoil="-no-divergence")], deadline_s=120).wait()
    return found


def distance(folder, name, other="tp1"):
    found, expected = (load_file(folder / f"{n}.safetensors") for n in (name, other))
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_minibatches_with_passes_before_them_end_at_the_weights_of_one_rank(folder, layout):
    assert distance(folder, str(Layout.parse(layout))) < 1e-5


def test_some_tokens_are_masked_and_some_are_not(folder):
    shares = load_file(folder / f"{Layout()}.safetensors")["told"][NUM_BATCHES:]
    assert 0 < shares.min() <= shares.max() < 1


def test_control_without_the_divergence_the_weights_are_others(folder):
    assert distance(folder, f"{Layout()}-no-divergence") > 1e-3
