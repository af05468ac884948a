import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.tree.split import split_by_score, split_evenly, temperature_at

RULES = ("logprob_high", "logprob_low", "entropy")

scores = st.lists(st.floats(-20, 5), min_size=1, max_size=12)


@given(
    scores=scores,
    extra=st.integers(0, 30),
    rule=st.sampled_from(RULES),
    temperature=st.floats(0.01, 50),
    seed=st.integers(0, 99),
)
def test_every_path_gets_one_and_all_of_the_budget_is_dealt(scores, extra, rule, temperature, seed):
    budget = len(scores) + extra
    for shares in (
        split_by_score(budget, scores, rule, temperature, random.Random(seed)),
        split_evenly(budget, len(scores), random.Random(seed)),
    ):
        assert sum(shares) == budget
        assert min(shares) >= 1


@given(
    scores=scores, extra=st.integers(0, 30), rule=st.sampled_from(RULES), seed=st.integers(0, 99)
)
def test_shares_follow_the_softmax_to_within_one_fork(scores, extra, rule, seed):
    sign = -1 if rule == "logprob_low" else 1
    weights = [math.exp(sign * (s - max(scores, key=lambda x: sign * x)) / 2) for s in scores]
    shares = split_by_score(len(scores) + extra, scores, rule, 2.0, random.Random(seed))
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - 1 - extra * weight / sum(weights)) < 1 + 1e-9


@pytest.mark.parametrize(
    ("rule", "shares"),
    [("logprob_high", [7, 2, 1]), ("logprob_low", [1, 2, 7]), ("entropy", [7, 2, 1])],
)
def test_the_rule_says_which_end_gets_more(rule, shares):
    # softmax of 0, -2, -4 at temperature 1: .867, .117, .016, of 7 forks beyond one each
    assert split_by_score(10, [-1.0, -3.0, -5.0], rule, 1.0, random.Random(0)) == shares


def test_a_high_temperature_deals_evenly_and_a_low_one_gives_all_to_the_best():
    assert split_by_score(9, [0.0, -1.0, -2.0], "logprob_high", 1e6, random.Random(0)) == [3, 3, 3]
    assert split_by_score(9, [0.0, -1.0, -2.0], "logprob_high", 1e-3, random.Random(0)) == [7, 1, 1]


def test_equal_scores_take_turns_at_the_remainder():
    lucky = Counter()
    for seed in range(300):
        shares = split_by_score(4, [-1.0] * 3, "logprob_low", 1.0, random.Random(seed))
        assert sorted(shares) == [1, 1, 2]
        lucky[shares.index(2)] += 1
    assert min(lucky.values()) > 60


@pytest.mark.parametrize(
    ("progress", "expected"), [(0, 5.0), (0.5, 3.0), (1, 1.0), (0.25, 3 + math.sqrt(2)), (2, 1.0)]
)
def test_the_temperature_goes_along_half_a_cosine(progress, expected):
    assert temperature_at(5.0, 1.0, progress) == pytest.approx(expected)


def test_without_an_end_the_temperature_stays():
    assert {temperature_at(2.0, None, p / 4) for p in range(5)} == {2.0}
