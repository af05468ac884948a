"""Each loss in closed form; `test_objective` has them against the textbook on trees."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.learner.made import edges_of, tensor
from tests.oracle import random_tree
from treepo_async.config.schema import LOSSES as NAMES
from treepo_async.learner.loss.policy import LOSSES, Clip, divergence, gspo, gspo_segment, ppo
from treepo_async.learner.packing.edges import Edges
from treepo_async.learner.packing.pack import pack
from treepo_async.learner.packing.piece import Piece

RANGE = Clip(low=0.2, high=0.28)
DUAL = Clip(low=0.2, high=0.28, dual=3.0)
ADVANTAGES = st.lists(st.floats(-3, 3), min_size=1, max_size=6)


def run(name, ratios, positive, negative, clip=RANGE, weight=None, anchor=None):
    """Loss, its gradient by each log-prob, and what the clip acts on; a slot a token."""
    anchor = torch.zeros(len(ratios)).double() if anchor is None else anchor
    theta = (anchor + tensor(*ratios).log()).requires_grad_()
    edges = edges_of([1] * len(ratios), positive=positive, negative=negative)
    weight = torch.ones(len(ratios)).double() if weight is None else weight
    found = LOSSES[name](edges, theta, anchor, weight, clip)
    (gradient,) = torch.autograd.grad(found.loss, theta, allow_unused=True)
    return found.loss.item(), gradient.tolist(), found.clipped.tolist()


def test_every_loss_of_the_config_is_there():
    assert tuple(LOSSES) == NAMES


# ------------------------------------------------------------------ values by hand


@pytest.mark.parametrize(
    ("ratio", "positive", "negative", "clip", "loss", "gradient", "clipped"),
    [
        (1.1, 2, 0, RANGE, -2.2, -2.2, 0),
        (1.5, 2, 0, RANGE, -2.56, 0, 1),
        (0.5, 2, 0, RANGE, -1.0, -1.0, 0),
        (1.5, 0, 2, RANGE, 3.0, 3.0, 0),
        (0.5, 0, 2, RANGE, 1.6, 0, 1),
        (1.5, 2, 1, RANGE, -1.06, 1.5, 1),
        (4.0, 0, 2, RANGE, 8.0, 8.0, 0),
        (4.0, 0, 2, DUAL, 6.0, 0, 1),
        (4.0, 2, 1, DUAL, 0.44, 0, 1),
        (2.0, 0, 2, DUAL, 4.0, 4.0, 0),
    ],
)
def test_ppo(ratio, positive, negative, clip, loss, gradient, clipped):
    found = run("ppo", [ratio], [positive], [negative], clip)
    assert found[0] == pytest.approx(loss)
    assert found[1] == pytest.approx([gradient])
    assert found[2] == [clipped]


@pytest.mark.parametrize(
    ("ratio", "low", "bounded", "clipped"),
    [(1.1, 0.2, 1.1, 0), (1.5, 0.2, 1.28, 1), (0.5, 0.2, 0.8, 1), (0.5, 1.0, 0.5, 0)],
)
def test_cispo_keeps_every_gradient_and_bounds_what_multiplies_it(ratio, low, bounded, clipped):
    found = run("cispo", [ratio], [3.0], [1.0], Clip(low=low, high=0.28))
    assert found[0] == pytest.approx(-2 * bounded * math.log(ratio))
    assert found[1] == pytest.approx([-2 * bounded])
    assert found[2] == [clipped]


def test_reinforce_has_no_ratio():
    loss, gradient, clipped = run("reinforce", [1.5, 0.01], [3.0, 0.0], [1.0, 4.0])
    assert loss == pytest.approx(-2 * math.log(1.5) + 4 * math.log(0.01))
    assert gradient == pytest.approx([-2.0, 4.0])
    assert clipped == [0, 0]


@pytest.mark.parametrize(
    ("before", "after", "positive", "negative", "gradient", "clipped"),
    [
        (0.5, 0.69, 2, 1, -1.38, 0),  # moved by less than 0.2
        (0.5, 0.75, 2, 1, 1.5, 1),  # further up: the positive part is left out
        (0.5, 0.75, 0, 1, 1.5, 0),
        (0.5, 0.25, 2, 1, -1.0, 1),  # further down: the negative part is
        (0.001, 0.1, 2, 0, -200.0, 0),  # a large ratio of small probabilities stays
    ],
)
def test_dppo_bounds_the_change_of_a_probability(
    before, after, positive, negative, gradient, clipped
):
    anchor = tensor(before).log()
    found = run("dppo", [after / before], [positive], [negative], anchor=anchor)
    assert found[0] == pytest.approx(gradient), "the loss is linear in the ratio"
    assert found[1] == pytest.approx([gradient])
    assert found[2] == [clipped]


@pytest.mark.parametrize("name", ["ppo", "cispo", "reinforce", "dppo"])
def test_a_weight_multiplies_the_term_of_its_token(name):
    ratios, positive, negative = [1.1, 0.9, 1.05], [1.0, 0.0, 2.0], [0.0, 3.0, 1.0]
    whole = run(name, ratios, positive, negative)[1]
    found = run(name, ratios, positive, negative, weight=tensor(0.0, 0.5, 2.0))[1]
    assert found == pytest.approx([w * g for w, g in zip((0, 0.5, 2), whole, strict=True)])


# ------------------------------------------------------------------ ratios of many tokens


def test_gspo_has_one_ratio_for_a_trajectory():
    """Log-ratios 0.3, 0.1, -0.1 in slots of two and one: their mean is 0.1."""
    edges = edges_of([2, 1], positive=[1.0, 1.0, 4.0])
    theta = tensor(0.3, 0.1, -0.1).requires_grad_()
    found = gspo(edges, theta, torch.zeros(3), torch.ones(3).double(), RANGE)
    (gradient,) = torch.autograd.grad(found.loss, theta)
    assert found.loss.item() == pytest.approx(-6 * math.exp(0.1))
    assert gradient.tolist() == pytest.approx([-2 * math.exp(0.1)] * 3)
    assert found.clipped.tolist() == [0, 0, 0]


def test_gspo_clips_a_trajectory_as_a_whole():
    """Two trajectories share the first slot; the mean log-ratios are 0.35 and -0.15, exp(0.35) = 1.42 is clipped."""
    edges = edges_of([1, 1, 1], parents=[-1, 0, 0], paths=[[0, 1], [0, 2]], positive=1.0)
    theta = tensor(0.1, 0.6, -0.4).requires_grad_()
    found = gspo(edges, theta, torch.zeros(3), torch.ones(3).double(), RANGE)
    (gradient,) = torch.autograd.grad(found.loss, theta)
    assert found.loss.item() == pytest.approx(-2 * 1.28 - 2 * math.exp(-0.15))
    assert gradient.tolist() == pytest.approx([-math.exp(-0.15), 0, -math.exp(-0.15)])
    assert found.clipped.tolist() == [0.5, 1, 0]


def test_weights_act_inside_of_a_trajectory_and_not_on_its_ratio():
    edges = edges_of([1, 1], positive=[1.0, 4.0])
    theta, weight = tensor(0.3, -0.1), tensor(0.0, 0.5)
    found = gspo(edges, theta, torch.zeros(2), weight, RANGE)
    assert found.loss.item() == pytest.approx(-(0 * 1 + 0.5 * 4) * math.exp(0.1))


def test_gspo_segment_has_one_ratio_for_a_level():
    """Slots 0 and 1 are one level, log-ratios 0.3, 0.3 and 0.0 of mean 0.2; slot 2 is the next."""
    edges = edges_of([2, 1, 1], levels=[0, 0, 1], positive=1.0)
    theta = tensor(0.3, 0.3, 0.0, -0.5)
    found = gspo_segment(edges, theta, torch.zeros(4), torch.ones(4).double(), RANGE)
    assert found.loss.item() == pytest.approx(-3 * math.exp(0.2) - math.exp(-0.5))


def test_where_a_segment_is_cut_at_a_version_boundary_changes_no_loss():
    rng = np.random.default_rng(1)
    whole = random_tree(rng, num_segments=12, forks_on_grid=True)
    cut, advantages = cut_in_two(whole), [rng.normal(size=len(whole.leaves))]
    assert len(cut.segments) > len(whole.segments)
    theta = {}
    for name in NAMES:
        losses = []
        for tree in (whole, cut):
            piece = Piece(0, tuple(range(len(tree.leaves))))
            (batch,) = pack([tree], advantages, [np.ones(len(tree.leaves))], [[piece]])
            edges = Edges.of(batch, torch.device("cpu"), dtype=torch.float64)
            ids = batch.input_ids[batch.target]
            # by its label and depth, which cutting leaves as they are
            rows = zip(ids.tolist(), batch.position_ids[batch.target].tolist(), strict=True)
            now = tensor(*(theta.setdefault(row, rng.normal(-1, 0.3)) for row in rows))
            anchor = torch.full_like(now, -1.0)
            losses.append(LOSSES[name](edges, now, anchor, torch.ones_like(now), RANGE).loss)
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12), name


def cut_in_two(tree):
    """The same tree with every segment of at least two tokens cut behind its first."""
    segments, last = [], {-1: -1}
    for i, segment in enumerate(tree.segments):
        parent = last[segment.parent]
        if len(segment) > 1:
            segments.append(
                replace(
                    segment,
                    parent=parent,
                    token_ids=segment.token_ids[:1],
                    behavior_logprobs=segment.behavior_logprobs[:1],
                    stop=None,
                )
            )
            parent = len(segments) - 1
            segment = replace(
                segment,
                token_ids=segment.token_ids[1:],
                behavior_logprobs=segment.behavior_logprobs[1:],
            )
        segments.append(replace(segment, parent=parent))
        last[i] = len(segments) - 1
    return replace(tree, segments=tuple(segments))


# ------------------------------------------------------------------ sums of advantages


@given(st.floats(-1.5, 1.5), ADVANTAGES)
def test_a_shared_token_loses_what_its_trajectories_lose(log_ratio, advantages):
    ratio, expected = math.exp(log_ratio), 0.0
    for a in advantages:
        expected -= min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
    positive = [sum(max(a, 0.0) for a in advantages)]
    negative = [sum(max(-a, 0.0) for a in advantages)]
    found = run("ppo", [ratio], positive, negative)[0]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_control_advantages_that_are_summed_before_the_clip_are_another_loss():
    right = run("ppo", [1.6], [2.0], [1.5])[0]
    assert abs(run("ppo", [1.6], [0.5], [0.0])[0] - right) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_flows_through_the_anchor_or_the_weight(name):
    edges = edges_of([2, 1], positive=1.0, negative=0.5)
    theta, anchor, weight = (torch.zeros(3).double().requires_grad_() for _ in range(3))
    LOSSES[name](edges, theta, anchor, weight + 1, RANGE).loss.backward()
    assert theta.grad is not None
    assert anchor.grad is None
    assert weight.grad is None


# ------------------------------------------------------------------ divergence


@pytest.mark.parametrize(
    ("estimator", "value", "gradient"),
    [
        ("k1", -0.5, 1.0),
        ("k2", 0.125, -0.5),
        ("k3", math.exp(0.5) - 1.5, 1 - math.exp(0.5)),
    ],
)
def test_estimators_of_the_divergence(estimator, value, gradient):
    theta = tensor(-1.0).requires_grad_()
    found = divergence(theta, tensor(-0.5), estimator)
    assert found.item() == pytest.approx(value)
    found.sum().backward()
    assert theta.grad.item() == pytest.approx(gradient)


@pytest.mark.parametrize(
    ("estimator", "is_mean", "is_gradient"),
    [("k1", True, False), ("k2", False, True), ("k3", True, False)],
)
def test_which_estimators_have_the_mean_and_which_the_gradient_of_the_divergence(
    estimator, is_mean, is_gradient
):
    logits = tensor(0.3, -0.2, 0.9, 0.0).requires_grad_()
    theta, reference = logits.log_softmax(0), tensor(0.0, 0.4, 0.1, 0.3).log_softmax(0)
    divergence_ = (theta.exp() * (theta - reference)).sum()
    sampled = divergence(theta, reference, estimator)
    mean = (theta.exp().detach() * sampled).sum()
    gradients = [
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (mean, divergence_)
    ]
    assert math.isclose(mean.item(), divergence_.item(), rel_tol=1e-9) == is_mean
    assert torch.allclose(*gradients, rtol=1e-9) == is_gradient


def test_ppo_is_the_loss_of_the_config_by_default():
    assert LOSSES["ppo"] is ppo


@pytest.mark.parametrize("name", NAMES)
def test_a_ratio_beyond_all_bounds_leaves_no_nan_in_the_gradient(name):
    far = torch.full((2,), 200.0, dtype=torch.float32).requires_grad_()
    edges = edges_of([1, 1], positive=[1.0, 0.0], negative=[0.0, 1.0])
    weight = tensor(0.0, 1.0)
    loss = LOSSES[name](edges, far, torch.zeros(2), weight, RANGE).loss
    (gradient,) = torch.autograd.grad(loss, far)
    assert torch.isfinite(gradient).all()
