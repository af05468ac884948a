"""Training in bfloat16 with float32 master weights."""

import numpy as np
import pytest
import torch

from tests.learner.shares import share_of
from tests.oracle import random_tree, tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

BUDGET = 80
"""Several microbatches a batch."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3", tied=True).save_pretrained(path)
    return path


def learner_of(folder, dtype, **optimizer):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    return build_learner(
        folder,
        optimizer=OptimizerSettings(**({"learning_rate": 1e-3, "weight_decay": 0.0} | optimizer)),
        loss=LossSettings(),
        microbatch_tokens=BUDGET,
        seed=1,
        dtype=dtype,
    )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng) for _ in range(4)]
    advantages = [rng.normal(size=len(tree.leaves)) for tree in trees]
    return share_of(trees, advantages, budget_tokens=BUDGET)


def weights_of(learner):
    return {name: tensor.clone() for name, tensor in learner.export()}


def distance(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def test_weights_are_bfloat16_and_all_that_adds_up_is_float32(folder):
    learner = learner_of(folder, torch.bfloat16)
    assert {weight.dtype for weight in learner.model.parameters()} == {torch.bfloat16}
    learner.train(batch())
    for weight in learner.model.parameters():
        assert weight.main_grad.dtype == weight.main_param.dtype == torch.float32
        assert torch.equal(weight, weight.main_param.bfloat16())
        assert not torch.equal(weight.float(), weight.main_param)
        assert learner.optimizer.moment("exp_avg")(weight).dtype == torch.float32
    assert {tensor.dtype for tensor in weights_of(learner).values()} == {torch.float32}


def test_the_model_starts_from_the_files_float32_weights(folder):
    original = weights_of(learner_of(folder, torch.float32))
    found = weights_of(learner_of(folder, torch.bfloat16))
    assert all(torch.equal(found[name], original[name]) for name in original)


def test_an_update_is_close_to_that_in_float32(folder):
    found, wanted = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        learner = learner_of(folder, dtype, max_grad_norm=0.0)
        result = learner.train(batch())
        gradients = {n: w.main_grad for n, w in learner.model.named_parameters()}
        target = wanted if dtype == torch.float32 else found
        target |= {n.replace("module.", ""): g.clone() for n, g in gradients.items()}
        target |= {"loss": torch.tensor(result.loss), "norm": torch.tensor(result.grad_norm)}
    assert found.keys() == wanted.keys()
    assert max(distance(found[name], wanted[name]) for name in wanted) < 0.1
    other = learner_of(folder, torch.float32, max_grad_norm=0.0)
    other.train(batch(seed=1))
    strange = {n.replace("module.", ""): w.main_grad for n, w in other.model.named_parameters()}
    assert min(distance(found[name], strange[name]) for name in strange) > 0.3


def test_updates_too_small_for_bfloat16_move_the_master_weights(folder):
    learner = learner_of(folder, torch.bfloat16, learning_rate=1e-6)
    before = weights_of(learner)
    rounded = [weight.clone() for weight in learner.model.parameters()]
    for _ in range(20):
        learner.train(batch())
    matrices = [name for name in before if before[name].dim() == 2]
    moved = [(weights_of(learner)[name] - before[name]).abs().median() for name in matrices]
    # Adam moves a weight by about the learning rate at each update of one sign
    assert min(float(distance) for distance in moved) > 5e-6
    # an update alone is lost on nearly every weight when it is added to one in bfloat16 ...
    lost = [(weight + 1e-6 == weight).float().mean() for weight in rounded]
    assert min(lost) > 0.8
    # ... and where all twenty add up to a step of bfloat16 the model takes it
    now = torch.cat([weight.flatten() for weight in learner.model.parameters()])
    assert 0 < (now != torch.cat([weight.flatten() for weight in rounded])).float().mean() < 0.2


def test_log_probs_of_a_frozen_reference_stay_when_the_weights_move(folder):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    learner = build_learner(
        folder,
        optimizer=OptimizerSettings(learning_rate=1e-2),
        loss=LossSettings(),
        microbatch_tokens=BUDGET,
        seed=1,
        dtype=torch.bfloat16,
        with_reference=True,
    )
    share = batch()

    def flat(of_reference):
        found = learner.logprobs(share, of_reference=of_reference)
        return np.concatenate([values for tree in found for values in tree])

    before = flat(False)
    np.testing.assert_array_equal(flat(True), before)
    learner.train(share)
    np.testing.assert_array_equal(flat(True), before)
    assert np.nanmax(np.abs(flat(False) - before)) > 0.05
    assert not any(weight.requires_grad for weight in learner.reference.parameters())
