"""Correction weights in closed form."""

import math

import pytest
import torch

from tests.learner.made import tensor
from treepo_async.config.schema import CORRECTIONS as NAMES
from treepo_async.learner.loss.correction import CORRECTIONS

RATIOS = tensor(0.4, 0.5, 1.0, 1.5, 2.0, 2.1)


def test_every_correction_of_the_config_is_there():
    assert tuple(CORRECTIONS) == NAMES


@pytest.mark.parametrize(
    ("name", "weights", "capped"),
    [
        ("none", [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]),
        ("truncated", [0.4, 0.5, 1, 1.5, 2, 2], [0, 0, 0, 0, 0, 1]),
        ("icepop", [0, 0.5, 1, 1.5, 2, 0], [1, 0, 0, 0, 0, 1]),
        ("importance", [0.4, 0.5, 1, 1.5, 2, 2.1], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_weights_by_the_ratio(name, weights, capped):
    nudged = RATIOS + tensor(0, 1e-12, 0, 0, -1e-12, 0)  # inside of the bounds they stand at
    found = CORRECTIONS[name](nudged.log(), 0.5, 2.0)
    assert found.weight.tolist() == pytest.approx(weights)
    assert found.capped.tolist() == [bool(c) for c in capped]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (1.0, 1.0)])
def test_a_log_ratio_of_zero_weighs_exactly_one(name, bounds):
    weight, capped = CORRECTIONS[name](torch.zeros(2), *bounds)
    assert weight.tolist() == [1.0, 1.0]
    assert not capped.any()


def test_importance_is_unbiased_and_truncation_is_not():
    """The mean of weight * f over what mu samples is the mean of f over what p samples."""
    mu, p, f = tensor(0.7, 0.2, 0.1), tensor(0.2, 0.3, 0.5), tensor(1.0, 5.0, -2.0)
    expected = (p * f).sum().item()
    log_ratio = (p / mu).log()
    means = {
        name: (mu * correct(log_ratio, 0.5, 2.0).weight * f).sum().item()
        for name, correct in CORRECTIONS.items()
    }
    assert means["importance"] == pytest.approx(expected)
    assert math.dist([means["truncated"]], [expected]) > 0.1
    assert math.dist([means["none"]], [expected]) > 0.1
