"""The loss of a shared token against the textbook loss of each of its trajectories."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.learner.loss import clipped, token_loss

ADVANTAGES = st.lists(st.floats(-3, 3), min_size=1, max_size=6)
LOG_RATIO = st.floats(-1.5, 1.5)


def textbook(log_ratio, advantages, weight, clip_low, clip_high):
    """Sum over trajectories of -w * min(r A, clip(r) A), and its derivative by the log-prob."""
    logprob = torch.tensor(log_ratio, dtype=torch.float64, requires_grad=True)
    ratio = logprob.exp()
    total = torch.zeros((), dtype=torch.float64)
    for advantage in advantages:
        bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
        total = total - weight * torch.minimum(ratio * advantage, bounded * advantage)
    (gradient,) = torch.autograd.grad(total, logprob)
    return total.item(), gradient.item()


def shared(log_ratio, positive, negative, weight, clip_low, clip_high):
    one = [
        torch.tensor([value], dtype=torch.float64)
        for value in (log_ratio, 0.0, weight, positive, negative)
    ]
    one[0].requires_grad_()
    loss = token_loss(*one, clip_low, clip_high).sum()
    (gradient,) = torch.autograd.grad(loss, one[0])
    return loss.item(), gradient.item()


@given(LOG_RATIO, ADVANTAGES, st.floats(0, 2))
def test_a_shared_token_loses_what_its_trajectories_lose(log_ratio, advantages, weight):
    positive = sum(max(a, 0.0) for a in advantages)
    negative = sum(max(-a, 0.0) for a in advantages)
    found = shared(log_ratio, positive, negative, weight, 0.2, 0.28)
    np.testing.assert_allclose(
        found, textbook(log_ratio, advantages, weight, 0.2, 0.28), rtol=1e-9, atol=1e-9
    )


def test_summing_advantages_before_the_clip_is_another_loss():
    advantages = [2.0, -1.5]
    right = textbook(0.5, advantages, 1.0, 0.2, 0.28)
    found = shared(0.5, max(sum(advantages), 0.0), max(-sum(advantages), 0.0), 1.0, 0.2, 0.28)
    assert abs(found[0] - right[0]) > 0.1
    assert abs(found[1] - right[1]) > 0.1


def test_no_gradient_flows_through_the_proximal_policy_or_the_weight():
    logprobs, proximal, weight = (torch.zeros(3, requires_grad=True) for _ in range(3))
    token_loss(
        logprobs, proximal, weight + 1, torch.ones(3), torch.ones(3), 0.2, 0.2
    ).sum().backward()
    assert logprobs.grad is not None
    assert proximal.grad is None
    assert weight.grad is None


def test_a_token_is_clipped_where_the_clip_stops_one_of_its_trajectories():
    log_ratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0])
    positive = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    negative = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])
    found = clipped(log_ratio, torch.zeros(5), positive, negative, 0.2, 0.28)
    assert found.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("odd", range(5))
def test_arguments_of_different_shapes_are_refused(odd):
    values = [torch.zeros(4) for _ in range(5)]
    values[odd] = torch.zeros(4, 1)
    with pytest.raises(ValueError, match="one shape"):
        token_loss(*values, 0.2, 0.2)
