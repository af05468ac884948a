import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.errors import ConfigError
from treepo_async.tree.advantage import advantages, batch_advantages, has_spread, whiten
from treepo_async.tree.cut import Run, VersionSpan, cut
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)

VECTORS = json.loads((Path(__file__).parent / "advantage_vectors.json").read_text())
GRID = 4

seeds = st.integers(0, 10_000)


def make_tree(leaves):
    """The tree whose leaves are described by the labels of their path, one label per grid level."""
    index, segments = {(): ROOT}, []
    for leaf in leaves:
        for level, num_tokens in enumerate(leaf["segment_tokens"]):
            node = tuple(leaf["path"][: level + 1])
            if node in index:
                continue
            index[node] = len(segments)
            segments.append(
                Segment(
                    parent=index[node[:-1]],
                    level=level,
                    token_ids=np.full(num_tokens, 7, np.int32),
                    behavior_logprobs=np.full(num_tokens, -1.0, np.float32),
                    policy_version=PolicyVersion(0, 0),
                    stop=StopReason.EOS if len(node) == len(leaf["path"]) else None,
                )
            )
    rewards_L = np.array([leaf["reward"] for leaf in leaves], np.float32)
    tree = Tree(
        prompt=Prompt("p", np.array([1], np.int32), "", ""),
        segments=tuple(segments),
        rewards_L=rewards_L,
        accuracies_L=rewards_L,
        sampling=Sampling(1.0, GRID, 8, len(leaves), 2),
        provenance=Provenance("lease", "actor"),
    )
    tree.check()
    return tree


def advantages_by_definition(tree):
    """Eq. 3-5 from the tokens: leaves are in one group at level k if their first k grid levels are the same tokens."""
    grid, tokens_L = tree.sampling.segment_tokens, []
    for leaf in tree.leaves:
        path = tree.path(leaf)
        tokens_L.append([(i, t) for i in path for t in range(len(tree.segments[i]))])
    scored = [leaf for leaf in range(len(tokens_L)) if not math.isnan(tree.rewards_L[leaf])]
    result = []
    for leaf, tokens in enumerate(tokens_L):
        reward, terms = float(tree.rewards_L[leaf]), []
        for level in range(math.ceil(len(tokens) / grid)):
            shared = tokens[: level * grid]
            group = [j for j in scored if tokens_L[j][: level * grid] == shared]
            if len(group) >= 2:
                terms.append(reward - sum(float(tree.rewards_L[j]) for j in group) / len(group))
        lone = [leaf] == scored
        result.append(reward if lone or not terms else sum(terms) / len(terms))
    return np.array(result)


def recut(tree, rng):
    """The same tree after weights changed at random tokens of its segments."""
    moved, starts, segments = {ROOT: ROOT}, {ROOT: 0}, []
    for i, segment in enumerate(tree.segments):
        spans, left = [], len(segment)
        while left > 0:
            spans.append(
                VersionSpan(PolicyVersion(0, 9 + len(spans)), int(rng.integers(1, left + 1)))
            )
            left -= spans[-1].num_tokens
        segments += cut(
            Run(segment.token_ids, segment.behavior_logprobs, tuple(spans)),
            parent=moved[segment.parent],
            first_index=len(segments),
            start=starts[segment.parent],
            segment_tokens=tree.sampling.segment_tokens,
            stop=segment.stop,
        )
        moved[i], starts[i] = len(segments) - 1, starts[segment.parent] + len(segment)
    result = replace(tree, segments=tuple(segments))
    result.check()
    return result


@pytest.mark.parametrize("name", VECTORS)
def test_treepo_agrees_with_the_reference_vectors(name):
    tree = make_tree(VECTORS[name]["leaves"])
    np.testing.assert_allclose(advantages(tree), VECTORS[name]["treepo_average"], atol=1e-6)


@pytest.mark.parametrize("name", VECTORS)
def test_whitening_agrees_with_the_reference_vectors(name):
    tree = make_tree(VECTORS[name]["leaves"])
    (found,) = batch_advantages([tree], "treepo", whitened=True)
    np.testing.assert_allclose(found, VECTORS[name]["treepo_average_whitened"], atol=2e-6)


@settings(deadline=None, max_examples=150)
@given(seed=seeds, nan_share=st.sampled_from([0.0, 0.3, 0.9]), num_segments=st.integers(1, 40))
def test_treepo_agrees_with_its_definition_on_tokens(seed, nan_share, num_segments):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, nan_share=nan_share, num_segments=num_segments)
    np.testing.assert_allclose(advantages(tree), advantages_by_definition(tree), atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(seed=seeds)
def test_cutting_segments_anywhere_leaves_every_advantage_unchanged(seed):
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, nan_share=0.1, num_segments=20)
    finer = recut(tree, rng)
    assert len(finer.leaves) == len(tree.leaves)
    assert np.array_equal(advantages(finer), advantages(tree), equal_nan=True)
    assert np.array_equal(finer.num_tokens_L, tree.num_tokens_L)


def test_counting_groups_by_segment_would_depend_on_cuts():
    """Control for the test above: the trees it makes do tell levels from segments."""
    tree = random_tree(np.random.default_rng(1), num_segments=20)
    finer = recut(tree, np.random.default_rng(2))

    def by_segment(tree):
        one_level_a_segment = replace(
            tree,
            segments=tuple(
                replace(s, level=len(tree.path(i)) - 1) for i, s in enumerate(tree.segments)
            ),
        )
        return advantages(one_level_a_segment)

    assert not np.allclose(by_segment(tree), by_segment(finer))


def test_a_leaf_whose_scoring_failed_counts_in_no_group():
    leaves = VECTORS["C2_binary_depth3_8leaves"]["leaves"]
    tree = make_tree(leaves)
    rewards_L = tree.rewards_L.copy()
    rewards_L[2] = np.nan
    found = advantages(replace(tree, rewards_L=rewards_L))
    assert np.isnan(found[2])
    assert np.allclose(np.delete(found, 2), advantages(make_tree(leaves[:2] + leaves[3:])))


def test_the_advantage_of_a_lone_scored_leaf_is_its_reward():
    leaves = VECTORS["C1_binary_depth2"]["leaves"]
    tree = replace(make_tree(leaves), rewards_L=np.array([np.nan, -0.5, np.nan, np.nan], "f4"))
    assert np.array_equal(advantages(tree), [np.nan, -0.5, np.nan, np.nan], equal_nan=True)


def test_equal_rewards_give_advantages_of_exactly_zero():
    leaves = [{**leaf, "reward": 0.1} for leaf in VECTORS["C2_binary_depth3_8leaves"]["leaves"]]
    assert np.abs(advantages(make_tree(leaves[:7]))).max() < 1e-15


def whitened_token_by_token(advantages_L, num_tokens_L):
    """Textbook whitening of the batch with every trajectory's advantage written on each of its tokens."""
    tokens = np.repeat(np.concatenate(advantages_L), np.concatenate(num_tokens_L))
    tokens = tokens[~np.isnan(tokens)]
    return [(a - tokens.mean()) / np.sqrt(tokens.var(ddof=1) + 1e-8) for a in advantages_L]


@settings(deadline=None, max_examples=50)
@given(seed=seeds)
def test_whitening_by_multiplicity_is_whitening_of_replicated_tokens(seed):
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, nan_share=0.2) for _ in range(2)]
    raw, num_tokens_L = [advantages(t) for t in trees], [t.num_tokens_L for t in trees]
    assume(np.concatenate(num_tokens_L)[np.isfinite(np.concatenate(raw))].sum() >= 2)
    for found, expected in zip(
        batch_advantages(trees, "treepo", whitened=True),
        whitened_token_by_token(raw, num_tokens_L),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_whitening_a_batch_of_two_prompts_shares_mean_and_variance():
    trees = [
        make_tree(VECTORS[n]["leaves"])
        for n in ("C3_ragged_early_stop", "C8_overlong_float_rewards")
    ]
    together = batch_advantages(trees, "treepo", whitened=True)
    tokens = np.repeat(np.concatenate(together), np.concatenate([t.num_tokens_L for t in trees]))
    assert abs(tokens.mean()) < 1e-12
    assert tokens.var(ddof=1) == pytest.approx(1, abs=1e-6)
    alone = batch_advantages(trees[:1], "treepo", whitened=True)
    assert not np.allclose(together[0], alone[0])


def test_whitening_with_unit_weights_would_differ():
    tree = make_tree(VECTORS["C3_ragged_early_stop"]["leaves"])
    raw = advantages(tree)
    unit = whiten([raw], [np.ones(len(raw), np.int64)])[0]
    assert not np.allclose(unit, whiten([raw], [tree.num_tokens_L])[0], atol=1e-2)


@pytest.mark.parametrize("value", [np.nan, 2.0])
def test_whitening_fewer_than_two_tokens_changes_nothing(value):
    found = whiten([np.array([value])], [np.array([1])])
    assert np.array_equal(found[0], [value], equal_nan=True)


def test_without_whitening_a_batch_has_its_raw_advantages():
    tree = make_tree(VECTORS["C3_ragged_early_stop"]["leaves"])
    (found,) = batch_advantages([tree], "treepo", whitened=False)
    assert np.array_equal(found, advantages(tree))


def test_an_unknown_estimator_is_refused_by_name():
    tree = make_tree(VECTORS["C1_binary_depth2"]["leaves"])
    with pytest.raises(ConfigError, match=r"learner\.estimator=gae is not one of treepo"):
        advantages(tree, "gae")


@pytest.mark.parametrize(
    ("accuracies_L", "spread"),
    [
        ([0, 1, 0, 0], True),
        ([1, 1, 1, 1], False),
        ([0, 0, 0, np.nan], False),
        ([0, np.nan, np.nan, 1], True),
        ([np.nan] * 4, False),
    ],
)
def test_spread_is_about_known_accuracies(accuracies_L, spread):
    tree = make_tree(VECTORS["C1_binary_depth2"]["leaves"])
    assert has_spread(replace(tree, accuracies_L=np.array(accuracies_L, "f4"))) is spread


@pytest.mark.parametrize(("accuracy", "spread"), [(1.0, True), (0.0, True), (np.nan, False)])
def test_a_lone_leaf_counts_as_spread_if_it_was_scored(accuracy, spread):
    tree = make_tree(VECTORS["C9_single_trajectory"]["leaves"])
    assert has_spread(replace(tree, accuracies_L=np.array([accuracy], "f4"))) is spread


def test_random_trees_have_groups_at_every_level():
    """Control: the property tests above are not about trees without forks."""
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, num_segments=20) for _ in range(20)]
    forked_levels = {
        tree.segments[parent].level
        for tree in trees
        for parent, count in Counter(s.parent for s in tree.segments).items()
        if parent != ROOT and count > 1
    }
    assert forked_levels >= {0, 1, 2}
