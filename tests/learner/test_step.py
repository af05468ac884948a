"""The whole update on tree-packed batches against Hugging Face, one trajectory at a time in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.learner.shares import share_of
from tests.oracle import random_tree, sequence_logprobs, tiny_qwen2, trajectory_loss
from treepo_async.learner.packing.pack import pack
from treepo_async.tree.advantage import batch_advantages
from treepo_async.types import PolicyVersion

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("groups")]

CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def learner_from(model_dir, *, microbatch_tokens=64, correction="truncated", **optimizer):
    from treepo_async.learner.build import build_learner
    from treepo_async.learner.loss.objective import LossSettings
    from treepo_async.learner.optimizer import OptimizerSettings

    return build_learner(
        model_dir,
        optimizer=OptimizerSettings(**({"max_grad_norm": 0.0, "learning_rate": 1e-3} | optimizer)),
        loss=LossSettings(**CLIP, correction=correction, correct_fresh=True),
        microbatch_tokens=microbatch_tokens,
        seed=1,
    )


def reference_from(model_dir):
    return tiny_qwen2(tied=model_dir.name == "tied").double()


def batch(seed=0, *, num_trees=5, nan_share=0.15, temperature=0.8):
    rng = np.random.default_rng(seed)
    trees = [
        random_tree(rng, temperature=temperature, nan_share=nan_share) for _ in range(num_trees)
    ]
    advantages = [
        np.where(np.isnan(tree.rewards_L), np.nan, rng.normal(size=len(tree.leaves)))
        for tree in trees
    ]
    return trees, advantages


def shaken(logprobs, seed=1, scale=0.4):
    """Log-probs of a policy so far away that many tokens are clipped."""
    rng = np.random.default_rng(seed)
    return [
        [values + scale * rng.normal(size=values.shape).astype(np.float32) for values in tree]
        for tree in logprobs
    ]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def whole(learner, trees, advantages, **known):
    """The share of the only replica."""
    return share_of(trees, advantages, budget_tokens=learner.microbatch_tokens, **known)


def logprobs_of(learner, trees):
    """Log-probs of every segment, those of unscored leaves too."""
    return learner.logprobs(whole(learner, trees, [np.zeros(len(tree.leaves)) for tree in trees]))


def gradient_errors(learner, reference):
    """Per Megatron parameter, |found - expected| / |expected| of its gradient.

    The expected gradients are cut to Megatron's shapes by loading them as if they were weights.
    """
    from treepo_async.learner.model.gpt import build_model
    from treepo_async.learner.model.hf import load

    expected = build_model(learner.shape)
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    load(expected, learner.shape, gradients.__getitem__)
    wanted = dict(expected.named_parameters())
    return {
        name: relative(weight.main_grad, wanted[name].detach())
        for name, weight in learner.model.named_parameters()
    }


def compare(learner, model_dir, trees, advantages, *, cap=2.0, proximal_logprobs=None):
    """Train once; the relative errors of the loss and of the worst gradient."""
    share = whole(learner, trees, advantages, proximal=proximal_logprobs)
    result = learner.train(share)
    reference = reference_from(model_dir)
    loss = trajectory_loss(
        reference, trees, advantages, **CLIP, cap=cap, proximal_logprobs=proximal_logprobs
    )
    loss.backward()
    errors = gradient_errors(learner, reference)
    return abs(result.loss / loss.item() - 1), max(errors.values()), result


@pytest.mark.parametrize("correction", ["truncated", "none"])
def test_loss_and_every_gradient_equal_the_trajectories_one_by_one(model_dir, correction):
    learner = learner_from(model_dir, correction=correction)
    cap = 2.0 if correction == "truncated" else None
    loss_error, gradient_error, result = compare(learner, model_dir, *batch(), cap=cap)
    assert loss_error < 1e-5
    assert gradient_error < 1e-5
    assert result.num_microbatches > 1


def test_they_equal_with_advantages_of_levels_as_well(model_dir):
    learner = learner_from(model_dir)
    trees, _ = batch()
    advantages = batch_advantages(trees, "treerl", whitened=True, path_weights="unbiased")
    assert all(a.ndim == 2 for a in advantages)
    proximal = shaken(logprobs_of(learner, trees))
    loss_error, gradient_error, result = compare(
        learner, model_dir, trees, advantages, proximal_logprobs=proximal
    )
    assert loss_error < 1e-5
    assert gradient_error < 1e-5
    assert 0.1 < result.clipped_share < 0.9


def test_control_advantages_of_another_level_are_another_loss(model_dir):
    learner = learner_from(model_dir)
    trees, _ = batch()
    advantages = batch_advantages(trees, "treerl", whitened=True)
    learner.train(whole(learner, trees, advantages))
    swapped = [np.where(np.isnan(a), a, a[:, :1]) for a in advantages]
    reference = reference_from(model_dir)
    trajectory_loss(reference, trees, swapped, **CLIP, cap=2.0).backward()
    assert max(gradient_errors(learner, reference).values()) > 1e-2


def test_they_equal_with_clipped_tokens_as_well(model_dir):
    learner = learner_from(model_dir)
    trees, advantages = batch()
    proximal = shaken(logprobs_of(learner, trees))
    loss_error, gradient_error, result = compare(
        learner, model_dir, trees, advantages, proximal_logprobs=proximal
    )
    assert loss_error < 1e-5
    assert gradient_error < 1e-5
    assert 0.1 < result.clipped_share < 0.9
    assert 0 < result.correction_capped_share < 0.9


def test_neither_the_microbatches_nor_the_order_of_trees_matters(model_dir):
    trees, advantages = batch()
    gradients, losses = [], []
    for budget, order in ((1, [0, 1, 2, 3, 4]), (10**6, [4, 2, 0, 3, 1])):
        learner = learner_from(model_dir, microbatch_tokens=budget)
        share = whole(learner, [trees[i] for i in order], [advantages[i] for i in order])
        result = learner.train(share)
        losses.append(result.loss)
        gradients.append([p.main_grad.clone() for p in learner.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert max(relative(a, b) for a, b in zip(*gradients, strict=True)) < 1e-5


def test_control_positions_by_packed_index_are_another_model(model_dir, monkeypatch):
    from treepo_async.learner.model.packed import PackedGPTModel

    monkeypatch.delattr(PackedGPTModel, "_preprocess")
    _, gradient_error, _ = compare(learner_from(model_dir), model_dir, *batch())
    assert gradient_error > 1e-2


def test_control_labels_by_a_shift_are_another_loss(model_dir, monkeypatch):
    from treepo_async.learner import step

    def pack_shifted(*args):
        return [replace(packed, target=packed.prev + 1) for packed in pack(*args)]

    monkeypatch.setattr(step, "pack", pack_shifted)
    _, gradient_error, _ = compare(learner_from(model_dir), model_dir, *batch())
    assert gradient_error > 1e-2


def test_control_advantages_summed_before_the_clip_are_another_loss(model_dir, monkeypatch):
    from treepo_async.learner import step

    def pack_summed(*args):
        return [
            replace(
                packed,
                positive=np.maximum(packed.positive - packed.negative, 0),
                negative=np.maximum(packed.negative - packed.positive, 0),
            )
            for packed in pack(*args)
        ]

    learner = learner_from(model_dir)
    trees, advantages = batch()
    proximal = shaken(logprobs_of(learner, trees))
    monkeypatch.setattr(step, "pack", pack_summed)
    _, gradient_error, _ = compare(
        learner, model_dir, trees, advantages, proximal_logprobs=proximal
    )
    assert gradient_error > 1e-2


def test_log_probs_of_segments_and_sequences_equal_hugging_face(model_dir):
    learner, reference = learner_from(model_dir), reference_from(model_dir)
    trees, _ = batch()
    found = logprobs_of(learner, trees)
    for tree, by_segment in zip(trees, found, strict=True):
        for leaf in tree.leaves:
            path = tree.path(leaf)
            response = np.concatenate([tree.segments[i].token_ids for i in path])
            ids = np.concatenate([tree.prompt.token_ids, response])
            expected = sequence_logprobs(reference, ids, 0.8)[-len(response) :]
            values = np.concatenate([by_segment[i] for i in path])
            np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-5)
    rng = np.random.default_rng(5)
    sequences = [rng.integers(1, 128, n, dtype=np.int32) for n in (1, 2, 17, 40, 3)]
    for ids, values in zip(sequences, learner.score(sequences), strict=True):
        expected = sequence_logprobs(reference, ids).detach().numpy()
        assert values.shape == (len(ids) - 1,)
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_statistics_are_means_per_trajectory_token(model_dir):
    learner = learner_from(model_dir)
    trees, advantages = batch(nan_share=0.0)
    version = PolicyVersion(0, 4)
    current = logprobs_of(learner, trees)
    result = learner.train(whole(learner, trees, advantages), version=version)
    rows = [
        (len(tree.segments[i].token_ids), tree.segments[i], current[t][i])
        for t, tree in enumerate(trees)
        for leaf in tree.leaves
        for i in tree.path(leaf)
    ]
    log_ratio = np.concatenate([now - segment.behavior_logprobs for _, segment, now in rows])
    weights = np.minimum(np.exp(log_ratio), 2.0)
    assert result.num_trajectory_tokens == len(log_ratio)
    assert result.num_trained_tokens == sum(tree.num_tokens for tree in trees)
    assert result.correction_weight_mean == pytest.approx(weights.mean(), rel=1e-4)
    assert result.correction_capped_share == pytest.approx((weights >= 2.0).mean())
    k3 = np.exp(log_ratio) - 1 - log_ratio
    assert result.kl_behavior == pytest.approx(k3.mean(), rel=1e-3)
    assert result.clipped_share == 0.0
    assert 0 < result.entropy < math.log(128)
    gaps = np.concatenate(
        [
            np.abs(current[t][i] - segment.behavior_logprobs)
            for t, tree in enumerate(trees)
            for i, segment in enumerate(tree.segments)
            if segment.policy_version == version and not segment.mixed_context
        ]
    )
    assert result.logprob_gap_mean == pytest.approx(gaps.mean(), rel=1e-4)
    assert result.logprob_gap_max == pytest.approx(gaps.max(), rel=1e-4)


def test_entropy_is_that_of_the_sampling_distribution(model_dir):
    learner, reference = learner_from(model_dir), reference_from(model_dir)
    tree = random_tree(np.random.default_rng(2), num_segments=1, temperature=0.5)
    result = learner.train(whole(learner, [tree], [np.ones(1)]))
    ids = np.concatenate([tree.prompt.token_ids, tree.segments[0].token_ids]).astype(np.int64)
    import torch

    logits = reference(torch.from_numpy(ids)[None]).logits[0, len(tree.prompt.token_ids) - 1 : -1]
    expected = torch.distributions.Categorical(logits=logits / 0.5).entropy().mean().item()
    assert result.entropy == pytest.approx(expected, rel=1e-5)


def test_without_a_token_of_the_version_there_is_no_gap(model_dir):
    learner = learner_from(model_dir)
    result = learner.train(whole(learner, *batch()), version=PolicyVersion(7, 7))
    assert math.isnan(result.logprob_gap_mean)
    assert math.isnan(result.logprob_gap_max)


@pytest.mark.parametrize("advantage", [np.inf, np.nan])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(model_dir, advantage):
    learner = learner_from(model_dir, warmup_steps=4)
    trees, advantages = batch()
    before = {name: tensor.clone() for name, tensor in learner.export()}
    spoilt = [np.full_like(advantages_L, advantage) for advantages_L in advantages]
    result = learner.train(whole(learner, trees, spoilt))
    assert result.num_skipped == 1
    assert not math.isfinite(result.loss)
    assert learner.optimizer.num_updates == 0
    assert all(tensor.equal(before[name]) for name, tensor in learner.export())
    after = learner.train(whole(learner, trees, advantages))
    assert after.num_skipped == 0
    assert after.learning_rate == pytest.approx(1e-3 / 4)
