"""Updates against torch.optim.AdamW on the Hugging Face model."""

import numpy as np
import pytest
import torch

from tests.learner.shares import share_of
from tests.oracle import random_tree, tiny_qwen2, trajectory_loss

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

LEARNING_RATE, WARMUP, DECAY, MAX_NORM = 1e-2, 2, 0.1, 0.05


def three_batches():
    rng = np.random.default_rng(4)
    for _ in range(3):
        trees = [random_tree(rng) for _ in range(3)]
        yield trees, [rng.normal(size=len(tree.leaves)) for tree in trees]


def megatron_weights(model_dir, *, weight_decay=DECAY, max_grad_norm=MAX_NORM):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    learner = build_learner(
        model_dir,
        optimizer=OptimizerSettings(
            learning_rate=LEARNING_RATE,
            warmup_steps=WARMUP,
            weight_decay=weight_decay,
            epsilon=1e-5,
            max_grad_norm=max_grad_norm,
        ),
        loss=LossSettings(),
        microbatch_tokens=100,
        seed=0,
    )
    results = [learner.train(share_of(*pair, budget_tokens=100)) for pair in three_batches()]
    return dict(learner.export()), results


def torch_weights(model_dir):
    model = tiny_qwen2(tied=model_dir.name == "tied").double()
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": DECAY},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5)
    norms = []
    for step, (trees, advantages) in enumerate(three_batches(), start=1):
        for group in adam.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, step / WARMUP)
        adam.zero_grad()
        trajectory_loss(model, trees, advantages, clip_low=0.2, clip_high=0.28, cap=2.0).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights, MAX_NORM).item())
        adam.step()
    return model.state_dict(), norms


def worst(found, expected):
    """Largest distance of a tensor from the expected one, in units of the tensor's norm."""
    return max(
        float((tensor - expected[name]).norm() / expected[name].norm())
        for name, tensor in found.items()
    )


def test_three_updates_with_warm_up_clipping_and_decay_equal_adamw(model_dir):
    found, results = megatron_weights(model_dir)
    expected, norms = torch_weights(model_dir)
    assert [r.learning_rate for r in results] == pytest.approx([5e-3, 1e-2, 1e-2])
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-4)
    assert min(norms) > MAX_NORM
    assert worst(found, expected) < 1e-5


def test_control_without_decay_or_clipping_the_weights_differ(model_dir):
    expected, _ = torch_weights(model_dir)
    assert worst(megatron_weights(model_dir, weight_decay=0.0)[0], expected) > 1e-4
    assert worst(megatron_weights(model_dir, max_grad_norm=0.0)[0], expected) > 1e-4
