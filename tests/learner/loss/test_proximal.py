"""The two policies that the current one is compared with, in closed form."""

import pytest
import torch

from tests.learner.made import edges_of, tensor
from treepo_async.learner.loss.proximal import behavior_logprobs, proximal_logprobs
from treepo_async.learner.packing.edges import UNKNOWN_LAG

THETA = tensor(-1.0, -2.0, -3.0).requires_grad_()


def proximal(name, **made):
    return proximal_logprobs(name, edges_of([1, 1, 1], **made), THETA)


@pytest.mark.parametrize(
    ("name", "recomputed", "expected"),
    [
        ("auto", None, [-1, -2, -3]),
        ("auto", [-4, -5, -6], [-4, -5, -6]),
        ("recomputed", [-4, -5, -6], [-4, -5, -6]),
        ("current", [-4, -5, -6], [-1, -2, -3]),
    ],
)
def test_the_centre_is_the_current_policy_or_that_at_the_start_of_the_batch(
    name, recomputed, expected
):
    found = proximal(name, proximal=recomputed)
    assert found.tolist() == expected
    assert not found.requires_grad


def test_interpolation_moves_from_the_behavior_policy_to_the_current_one_with_the_lag():
    found = proximal("interpolated", behavior=[-2.0, -4.0, -7.0], lag=[0, 1, 3])
    assert found.tolist() == pytest.approx([-2, -3, -4])
    assert not found.requires_grad


def test_interpolation_takes_tokens_of_no_known_lag_for_infinitely_old():
    found = proximal("interpolated", behavior=-9.0, lag=[UNKNOWN_LAG, 0, UNKNOWN_LAG])
    assert found.tolist() == [-1, -9, -3]


def test_what_was_not_recomputed_is_missed():
    with pytest.raises(ValueError, match="start of the batch"):
        proximal("recomputed")


def test_the_behavior_policy_of_fresh_tokens_is_the_proximal_one_unless_they_are_corrected():
    edges, p = edges_of([3], behavior=-5.0, fresh=[True, False, True]), tensor(-1, -2, -3)
    assert behavior_logprobs(edges, p, correct_fresh=False).tolist() == [-1, -5, -3]
    assert behavior_logprobs(edges, p, correct_fresh=True).tolist() == [-5, -5, -5]
    assert torch.equal(p - behavior_logprobs(edges, p, correct_fresh=False), tensor(0, 3, 0))
