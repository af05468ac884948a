import math

import pytest
import torch

from treepo_async.bench.learner_gradient import SMALL, copied, norm, worst_gap


def model_of(**gradients):
    """A model whose parameters have these gradients."""
    model = torch.nn.Module()
    for name, values in gradients.items():
        parameter = torch.nn.Parameter(torch.zeros(len(values)))
        parameter.main_grad = torch.tensor(values)
        model.register_parameter(name, parameter)
    return model


def test_the_worst_tensor_is_named_with_its_difference_relative_to_its_norm():
    expected = copied(model_of(large=[30.0, 40.0], small=[0.0, 5.0]))
    assert worst_gap(model_of(large=[30.0, 40.0], small=[0.0, 5.0]), expected) == (0.0, "small")
    gap, name = worst_gap(model_of(large=[30.0, 41.0], small=[0.0, 5.5]), expected)
    assert (gap, name) == (pytest.approx(0.1), "small")
    # two gradients of one norm
    gap, name = worst_gap(model_of(large=[40.0, 30.0], small=[0.0, 5.0]), expected)
    assert (gap, name) == (pytest.approx(math.sqrt(200) / 50), "large")


def test_a_gradient_that_is_nothing_but_rounding_is_judged_by_the_whole_one():
    expected = copied(model_of(large=[1.0], none=[0.0]))
    gap, _ = worst_gap(model_of(large=[1.0], none=[1e-6]), expected)
    assert gap == pytest.approx(1e-6 / SMALL)


def test_a_gradient_that_is_no_number_differs_from_every_other():
    expected = copied(model_of(first=[1.0], second=[2.0]))
    assert worst_gap(model_of(first=[math.nan], second=[2.0]), expected) == (math.inf, "first")


def test_a_copy_stays_and_the_norm_is_of_all_tensors():
    model = model_of(first=[3.0], second=[4.0])
    kept = copied(model)
    for weight in model.parameters():
        weight.main_grad.zero_()
    assert kept["second"].tolist() == [4.0]
    assert norm(model) == 0.0
    assert norm(model_of(first=[3.0], second=[4.0])) == 5.0
