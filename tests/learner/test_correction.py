"""Correction weights in closed form."""

import math

import pytest
import torch

from treepo_async.errors import ConfigError
from treepo_async.learner.correction import find_correction, none, truncated


def test_the_weight_is_the_importance_ratio_up_to_the_cap():
    behavior = torch.tensor([-1.0, -1.0, -1.0])
    proximal = torch.tensor([-1.0 + math.log(1.5), -2.0, 3.0], requires_grad=True)
    weight = truncated(proximal, behavior, 2.0)
    assert not weight.requires_grad
    assert weight.tolist() == pytest.approx([1.5, math.exp(-1), 2.0])


def test_no_correction_counts_every_token_once():
    assert none(torch.tensor([-5.0]), torch.tensor([-1.0]), 2.0).tolist() == [1.0]


def test_a_misspelt_correction_is_refused_with_the_nearest():
    assert find_correction("truncated") is truncated
    with pytest.raises(ConfigError, match="did you mean 'truncated'"):
        find_correction("truncate")
    with pytest.raises(ConfigError, match="there are: truncated, none"):
        find_correction("xyz")
