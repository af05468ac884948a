"""What corrections remove of the bias of data that are 8 updates old, by enumeration of every response."""

import re
from pathlib import Path

import pytest
import torch

from tests.learner.bias import LAG, PLAIN, SIZE, Problem, ratios, rows

TOKEN_WEIGHTS = ("`importance`", "decoupled PPO", "A-3PO", "`truncated`, cap 2")
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "corrections.md"


@pytest.fixture(scope="module")
def apart():
    return ratios("apart")


@pytest.fixture(scope="module")
def joint():
    return ratios("joint")


@pytest.mark.parametrize("name", ["apart", "joint"])
def test_the_gradient_on_policy_is_that_of_the_expected_reward(name):
    problem = Problem.draw(name, 0)
    table = problem.tables[LAG].clone().requires_grad_()
    value = (problem.logprobs(table).sum(1).exp() * problem.rewards).sum()
    (expected,) = torch.autograd.grad(value, table)
    found = problem.gradient(PLAIN, problem.probabilities(LAG))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", TOKEN_WEIGHTS)
def test_token_weights_remove_the_bias_where_tokens_are_apart(apart, variant):
    assert apart[variant] < 0.2
    assert apart["no correction"] == 1
    assert apart[SIZE] > 0.2, "there is something to remove"


def test_control_a_cap_that_is_too_low_leaves_bias(apart):
    assert apart["`truncated`, cap 1.2"] > 0.2


def test_token_weights_leave_most_of_the_bias_where_tokens_hang_together(joint):
    """The limit of all weights of single tokens: the odds of what comes before and after are not in them."""
    for variant in TOKEN_WEIGHTS:
        assert 0.5 < joint[variant] < 1


def test_the_document_has_the_table_that_the_command_prints():
    documented = re.findall(r"^\| .* \| [\d.]+ \| [\d.]+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert documented == rows()
