import asyncio
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from tests.fakes import text_of
from treepo_async.actor.score import Scoring, open_scoring, shuffled
from treepo_async.config.schema import RewardConfig
from treepo_async.errors import ConfigError, TreeError
from treepo_async.scoring.async_scorer import Inline
from treepo_async.scoring.failures import Failure
from treepo_async.scoring.reward import RewardRules
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
)

PROMPT = Prompt("p", np.array([9], np.int32), "2 + 2", "four")
SAMPLING = Sampling(1.0, 4, 5, 3, 2)


def segment(parent, level, text, stop=None):
    ids = np.array([ord(c) for c in text], np.int32)
    return Segment(
        parent, level, ids, np.full(len(ids), -1.0, np.float32), PolicyVersion(0, 0), stop
    )


SEGMENTS = (
    segment(ROOT, 0, "abcd"),
    segment(0, 1, "four", StopReason.LENGTH),
    segment(0, 1, "five", StopReason.LENGTH),
    segment(ROOT, 0, "fou", StopReason.EOS),
)


def scored(scorer, segments=SEGMENTS, **rules):
    """The tree, scored; `rules` replaces some of the reward's."""
    defaults = {"correct": 2.0, "wrong": -0.5, "max_response_tokens": 20}
    scoring = Scoring(Inline(scorer), text_of, RewardRules(**{**defaults, **rules}))
    return asyncio.run(scoring.score(PROMPT, segments, Provenance("lease", "actor-0"), SAMPLING))


def pruned(*indices):
    """The segments with some of the leaves pruned instead."""
    return tuple(
        replace(each, stop=StopReason.PRUNED) if index in indices else each
        for index, each in enumerate(SEGMENTS)
    )


def test_each_leaf_is_scored_on_the_text_of_its_whole_path():
    seen = []

    def scorer(response, answer):
        seen.append((response, answer))
        return float(answer in response)

    tree = scored(scorer)
    assert seen == [("abcdfour", "four"), ("abcdfive", "four"), ("fou", "four")]
    np.testing.assert_array_equal(tree.accuracies_L, [1, 0, 0])
    np.testing.assert_array_equal(tree.rewards_L, [2, -0.5, -0.5])


def test_a_scorer_that_raises_costs_its_own_leaf_only():
    def scorer(response, answer):
        if "five" in response:
            raise LookupError("no such answer")
        return 0.5

    tree = scored(scorer)
    np.testing.assert_array_equal(tree.accuracies_L, [0.5, np.nan, 0.5])
    np.testing.assert_array_equal(tree.rewards_L, [0.75, np.nan, 0.75])


def test_a_pruned_leaf_is_never_scored_and_is_no_error():
    seen = []

    def scorer(response, answer):
        seen.append(response)
        return float(answer in response)

    tree = scored(scorer, pruned(1))
    assert seen == ["abcdfive", "fou"]
    np.testing.assert_array_equal(tree.accuracies_L, [np.nan, 0, 0])
    np.testing.assert_array_equal(tree.rewards_L, [np.nan, -0.5, -0.5])


def test_a_tree_whose_leaves_are_all_pruned_has_no_reward():
    tree = scored(lambda *_: 1.0, pruned(1, 2, 3))
    assert np.isnan(tree.accuracies_L).all()
    assert np.isnan(tree.rewards_L).all()


def test_a_long_response_pays_the_overlong_penalty_and_keeps_its_accuracy():
    tree = scored(lambda *_: 1.0, max_response_tokens=8, overlong_tokens=4, overlong_penalty=1.5)
    np.testing.assert_array_equal(tree.num_tokens_L, [8, 8, 3])
    np.testing.assert_array_equal(tree.accuracies_L, [1, 1, 1])
    np.testing.assert_array_equal(tree.rewards_L, [0.5, 0.5, 2])


async def test_an_actors_scoring_is_opened_from_its_config_and_counts_reward_errors():
    config = RewardConfig(
        scorer="tests.scoring.scorers:obey", correct=2.0, overlong_tokens=4, overlong_penalty=1.0
    )
    orders = (segment(ROOT, 0, "nan", StopReason.EOS), segment(ROOT, 0, "bool", StopReason.EOS))
    async with open_scoring(config, decode=text_of, max_response_tokens=4) as scoring:
        tree = await scoring.score(PROMPT, orders, Provenance("lease", "actor-0"), SAMPLING)
        assert scoring.failures == {Failure.NOT_FINITE: 1}
    np.testing.assert_array_equal(tree.accuracies_L, [np.nan, 1])
    np.testing.assert_array_equal(tree.rewards_L, [np.nan, 1])


async def test_a_scorer_that_does_not_exist_is_told_when_the_scoring_is_opened():
    with pytest.raises(ConfigError, match="did you mean exact"):
        async with open_scoring(RewardConfig("exat"), decode=text_of, max_response_tokens=4):
            pass


def first_is_right(response, _answer):
    """Right, failed, wrong: one of each."""
    return {"abcdfour": 1.0, "abcdfive": math.nan, "fou": 0.0}[response]


def test_shuffled_scores_are_the_same_scores_at_other_leaves_and_stay_pairs():
    trees = [shuffled(scored(first_is_right), random.Random(seed)) for seed in range(40)]
    orders = {str(tree.accuracies_L) for tree in trees}
    assert len(orders) == 6
    for tree in trees:
        np.testing.assert_array_equal(np.sort(tree.accuracies_L), [0, 1, np.nan])
        np.testing.assert_array_equal(tree.rewards_L, 2.5 * tree.accuracies_L - 0.5)


def test_a_shuffle_is_decided_by_its_seed_and_leaves_its_tree_alone():
    tree = scored(first_is_right)
    first, second = (shuffled(tree, random.Random(3)) for _ in range(2))
    np.testing.assert_array_equal(first.accuracies_L, second.accuracies_L)
    np.testing.assert_array_equal(tree.accuracies_L, [1, np.nan, 0])
    first.check()


def test_a_shuffle_leaves_pruned_leaves_without_a_score():
    tree = scored(lambda response, _: float(response == "fou"), pruned(1))
    orders = {str(shuffled(tree, random.Random(seed)).accuracies_L) for seed in range(20)}
    assert orders == {"[nan  1.  0.]", "[nan  0.  1.]"}


def test_an_accuracy_that_is_no_finite_number_counts_as_failed():
    assert np.isnan(scored(lambda *_: math.inf).rewards_L).all()


def test_a_tree_that_breaks_its_invariants_is_not_handed_on():
    unfinished = (*SEGMENTS[:3], segment(ROOT, 0, "fou"))
    with pytest.raises(TreeError, match=r"segments\[3\].stop is None"):
        scored(lambda *_: 1.0, unfinished)
