"""Rewards against closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.config.schema import RewardConfig
from treepo_async.scoring.reward import RewardRules, overlong, rewards


def rules(**changes):
    return RewardRules(
        **{"correct": 1.0, "wrong": -1.0, "max_response_tokens": 7168}
        | {"overlong_tokens": 512, "overlong_penalty": 1.0}
        | changes
    )


def lengths(*tokens):
    return np.array(tokens, np.int64)


def test_the_reward_is_linear_and_exact_at_both_ends():
    accuracies_L = np.array([1, 0, 0.25, np.nan], np.float32)
    got_L = rewards(
        accuracies_L, lengths(1, 1, 1, 1), rules(correct=0.1, wrong=-0.3, overlong_tokens=0)
    )
    np.testing.assert_array_equal(got_L, np.array([0.1, -0.3, -0.2, np.nan], np.float32))
    assert got_L.dtype == np.float32


@pytest.mark.parametrize(
    ("num_tokens", "penalty"),
    [(1, 0), (6655, 0), (6656, 0), (6657, -1 / 512), (6784, -0.25), (6912, -0.5), (7168, -1)],
)
def test_the_overlong_penalty_falls_linearly_over_the_last_tokens(num_tokens, penalty):
    assert overlong(lengths(num_tokens), rules())[0] == penalty
    assert overlong(lengths(num_tokens), rules(overlong_penalty=3.0))[0] == 3 * penalty


def test_right_and_wrong_responses_pay_the_same_penalty_and_failed_ones_stay_unscored():
    accuracies_L = np.array([1, 0, np.nan, 1], np.float32)
    got_L = rewards(accuracies_L, lengths(6912, 6912, 6912, 100), rules())
    np.testing.assert_array_equal(got_L, np.array([0.5, -1.5, np.nan, 1.0], np.float32))


def test_without_a_zone_there_is_no_penalty_at_any_length():
    got_L = overlong(lengths(1, 7168, 10**6), rules(overlong_tokens=0))
    np.testing.assert_array_equal(got_L, [0, 0, 0])


@given(
    st.integers(1, 1000),
    st.integers(1, 1000),
    st.floats(0, 10),
    st.lists(st.integers(1, 1000), min_size=1),
)
def test_the_penalty_never_rises_with_the_length_and_lies_between_0_and_the_penalty(
    limit, zone, penalty, tokens
):
    tokens_L = np.sort(np.minimum(tokens, limit))
    got_L = overlong(
        tokens_L, rules(max_response_tokens=limit, overlong_tokens=zone, overlong_penalty=penalty)
    )
    assert (np.diff(got_L) <= 0).all()
    assert (got_L <= 0).all()
    assert (got_L >= -penalty * (1 + 1e-12)).all()


def test_the_rules_are_those_of_the_config():
    config = RewardConfig(correct=2.0, wrong=-0.5, overlong_tokens=7, overlong_penalty=0.25)
    assert RewardRules.of(config, 70) == RewardRules(2.0, -0.5, 70, 7, 0.25)
