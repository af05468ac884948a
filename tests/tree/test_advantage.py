from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import SlowEstimators, random_tree, with_pruning
from tests.tree.vectors import TREES, coarsened, expected_rows, make_tree, recut, vector
from treepo_async.config.schema import ESTIMATORS, LEAVE_ONE_OUT, PATH_WEIGHTS
from treepo_async.errors import ConfigError
from treepo_async.tree.advantage import OF_SEGMENTS, OF_TRAJECTORIES, advantages, has_spread
from treepo_async.tree.levels import num_levels
from treepo_async.types import ROOT, StopReason

WAYS = [
    (estimator, leave_one_out)
    for estimator in ESTIMATORS
    for leave_one_out in (False, True)
    if not leave_one_out or estimator in LEAVE_ONE_OUT
]
by_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)
by_way = pytest.mark.parametrize(("estimator", "leave_one_out"), WAYS)
seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True)
def _no_division_goes_wrong():
    with np.errstate(divide="raise", invalid="raise", over="raise"):
        yield


def any_tree(seed, *, num_segments=30, nan_share=0.2, pruned=True):
    """Of any shape, with cuts, ends inside of levels, rewards that are 0, 1 or neither, and chances to go on."""
    rng = np.random.default_rng(seed)
    tree = random_tree(rng, num_segments=num_segments, nan_share=nan_share)
    if seed % 2:
        noise_L = rng.normal(size=len(tree.leaves)).astype(np.float32)
        tree = replace(tree, rewards_L=tree.rewards_L + noise_L)
    return with_pruning(tree, rng) if pruned else tree


def with_rewards(tree, rewards_L):
    return replace(tree, rewards_L=np.array(rewards_L, np.float32))


def test_the_implementations_are_the_estimators_of_the_config():
    assert [*OF_TRAJECTORIES, *OF_SEGMENTS] == list(ESTIMATORS)


@pytest.mark.parametrize("name", TREES)
@by_estimator
def test_every_estimator_agrees_with_the_reference_vectors(estimator, name):
    expected = expected_rows(TREES[name]["expected"][estimator])
    np.testing.assert_allclose(advantages(vector(name), estimator), expected, atol=1e-6)


@by_way
@pytest.mark.parametrize("path_weights", PATH_WEIGHTS)
@settings(deadline=None, max_examples=50)
@given(
    seed=seeds,
    nan_share=st.sampled_from([0.0, 0.3, 0.9]),
    num_segments=st.integers(1, 40),
    pruned=st.booleans(),
)
def test_every_estimator_agrees_with_its_definition_on_tokens(
    estimator, leave_one_out, path_weights, seed, nan_share, num_segments, pruned
):
    tree = any_tree(seed, num_segments=num_segments, nan_share=nan_share, pruned=pruned)
    options = {"leave_one_out": leave_one_out, "path_weights": path_weights}
    found = advantages(tree, estimator, **options)
    expected = SlowEstimators(tree, **options).advantages(estimator)
    np.testing.assert_allclose(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("one", "other"), [*combinations(WAYS, 2)])
def test_control_no_two_estimators_agree_on_random_trees(one, other):
    trees = [any_tree(seed, nan_share=0.0) for seed in range(6)]

    def values(way):
        rows = [advantages(tree, way[0], leave_one_out=way[1]) for tree in trees]
        return np.concatenate([row if row.ndim == 1 else row[:, 0] for row in rows])

    assert not np.allclose(values(one), values(other), atol=1e-3, equal_nan=True)


@by_way
def test_control_weights_and_chances_to_go_on_change_every_estimator(estimator, leave_one_out):
    tree = any_tree(1)
    sure = replace(tree, segments=tuple(replace(s, inclusion=1.0) for s in tree.segments))
    equal, unbiased, without = (
        advantages(t, estimator, leave_one_out=leave_one_out, path_weights=weights)
        for t, weights in ((tree, "equal"), (tree, "unbiased"), (sure, "equal"))
    )
    assert not np.allclose(equal, unbiased, equal_nan=True)
    assert not np.allclose(equal, without, equal_nan=True)


@by_way
@pytest.mark.parametrize("path_weights", PATH_WEIGHTS)
@settings(deadline=None, max_examples=30)
@given(seed=seeds)
def test_cutting_segments_anywhere_leaves_every_advantage_unchanged(
    estimator, leave_one_out, path_weights, seed
):
    tree = any_tree(seed)
    finer = recut(tree, np.random.default_rng(seed))
    options = {"leave_one_out": leave_one_out, "path_weights": path_weights}
    found, expected = (advantages(t, estimator, **options) for t in (finer, tree))
    assert np.array_equal(found, expected, equal_nan=True)


def test_control_counting_by_segment_would_depend_on_cuts():
    tree = any_tree(1, nan_share=0.0, pruned=False, num_segments=60)
    finer = recut(tree, np.random.default_rng(2))

    def by_segment(tree, estimator):
        one_level_a_segment = replace(
            tree,
            segments=tuple(
                replace(s, level=len(tree.path(i)) - 1) for i, s in enumerate(tree.segments)
            ),
        )
        values = advantages(one_level_a_segment, estimator)
        return values if values.ndim == 1 else np.nansum(values, axis=1)

    moved = {
        estimator
        for estimator in ESTIMATORS
        if not np.allclose(by_segment(tree, estimator), by_segment(finer, estimator))
    }
    # a cut makes a level without a fork, which these do not count or give 0
    unmoved = {"grpo", "rloo", "tree_grpo", "treepo_dedup_levels", "treerpo", "spo"}
    assert moved == set(ESTIMATORS) - unmoved


@by_estimator
def test_control_dropping_levels_changes_every_estimator_that_knows_levels(estimator):
    tree = any_tree(3, nan_share=0.0)
    found, coarse = (advantages(t, estimator) for t in (tree, coarsened(tree)))
    same = found.shape == coarse.shape and np.allclose(found, coarse, equal_nan=True)
    assert same == (estimator in ("grpo", "rloo"))


@by_estimator
def test_control_dropping_a_leaf_changes_every_estimator(estimator):
    tree = any_tree(3, nan_share=0.0, pruned=False)
    fewer = with_rewards(tree, [np.nan, *tree.rewards_L[1:]])
    assert not np.allclose(advantages(tree, estimator)[1:], advantages(fewer, estimator)[1:])


@by_way
@pytest.mark.parametrize("path_weights", PATH_WEIGHTS)
def test_weights_that_are_all_equal_change_no_bit(estimator, leave_one_out, path_weights):
    """Full ternary trees: three children at every node, and the same chance to go on at every level."""
    labels = [(a, a + b, a + b + c) for a in "xyz" for b in "xyz" for c in "xyz"]
    rewards = np.random.default_rng(0).normal(size=len(labels))
    leaves = [
        {"path": path, "reward": reward, "segment_tokens": [4, 4, 4]}
        for path, reward in zip(labels, rewards, strict=True)
    ]
    tree = make_tree(leaves)
    chances = (0.7, 0.3, 1.0)
    judged = replace(
        tree, segments=tuple(replace(s, inclusion=chances[s.level]) for s in tree.segments)
    )
    found = advantages(judged, estimator, leave_one_out=leave_one_out, path_weights=path_weights)
    plain = advantages(tree, estimator, leave_one_out=leave_one_out)
    assert np.array_equal(found, plain, equal_nan=True)


@by_way
def test_a_leaf_whose_scoring_failed_counts_in_no_group(estimator, leave_one_out):
    leaves = TREES["C2_binary_depth3_8leaves"]["leaves"]
    tree = make_tree(leaves)
    failed = with_rewards(tree, [*tree.rewards_L[:2], np.nan, *tree.rewards_L[3:]])
    found = advantages(failed, estimator, leave_one_out=leave_one_out)
    without = advantages(make_tree(leaves[:2] + leaves[3:]), estimator, leave_one_out=leave_one_out)
    assert np.isnan(found[2]).all()
    assert np.allclose(np.delete(found, 2, axis=0), without)


@by_estimator
def test_a_pruned_leaf_counts_in_no_group_but_is_a_child(estimator):
    tree = vector("C3_ragged_early_stop")
    first = replace(tree.segments[0], stop=StopReason.PRUNED)
    tree = replace(tree, segments=(first, *tree.segments[1:]))
    pruned = with_rewards(tree, [np.nan, *tree.rewards_L[1:]])
    without = make_tree(TREES["C3_ragged_early_stop"]["leaves"][1:])
    for path_weights in PATH_WEIGHTS:
        found = advantages(pruned, estimator, path_weights=path_weights)
        assert np.isnan(found[0]).all()
        expected = advantages(without, estimator, path_weights=path_weights)
        assert np.allclose(found[1:], expected, equal_nan=True)


@by_estimator
def test_a_tree_without_a_scored_leaf_has_no_advantages(estimator):
    tree = vector("C3_ragged_early_stop")
    found = advantages(with_rewards(tree, [np.nan] * 4), estimator, path_weights="unbiased")
    assert found.shape == ((4, 3) if estimator in OF_SEGMENTS else (4,))
    assert np.isnan(found).all()


@by_estimator
@pytest.mark.parametrize("path_weights", PATH_WEIGHTS)
def test_a_lone_scored_leaf_has_the_value_that_the_docstring_gives_it(estimator, path_weights):
    tree = with_rewards(vector("C1_binary_depth2"), [np.nan, -0.5, np.nan, np.nan])
    found = advantages(tree, estimator, path_weights=path_weights)
    lone = {"grpo": -0.5 / (1 + 1e-6)} if estimator in LEAVE_ONE_OUT else {}
    value = lone.get(estimator, -0.5 if estimator.startswith("treepo") else 0.0)
    assert (found[1] == value).all()
    assert np.isnan(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize("estimator", LEAVE_ONE_OUT)
def test_leaving_a_lone_leaf_out_changes_nothing(estimator):
    tree = vector("C9_single_trajectory")
    assert advantages(tree, estimator, leave_one_out=True) == advantages(tree, estimator)


@by_estimator
def test_a_single_chain_has_the_values_of_a_lone_leaf_on_every_level(estimator):
    leaf = {"path": ["a", "b", "c"], "reward": 1.0, "segment_tokens": [4, 4, 1]}
    found = advantages(make_tree([leaf]), estimator)
    short = advantages(make_tree([{**leaf, "path": ["a"], "segment_tokens": [2]}]), estimator)
    assert found.shape == ((1, 3) if estimator in OF_SEGMENTS else (1,))
    assert (found == short.item()).all()


@pytest.mark.parametrize("estimator", OF_SEGMENTS)
def test_values_of_levels_end_with_the_leaf(estimator):
    tree = any_tree(4)
    found = advantages(tree, estimator)
    assert found.shape == (len(tree.leaves), num_levels(tree))
    for leaf, segment in enumerate(tree.leaves):
        depth = tree.segments[segment].level + 1
        known = 0 if np.isnan(tree.rewards_L[leaf]) else depth
        assert np.isfinite(found[leaf]).tolist() == [k < known for k in range(num_levels(tree))]


@pytest.mark.parametrize(("estimator", "value"), [("treerl", 0.2566), ("treerpo", 0), ("spo", 0)])
def test_a_level_without_a_fork_has_the_value_that_the_docstring_gives_it(estimator, value):
    found = advantages(vector("C7_chain_then_branch_after_fallback"), estimator)
    assert found[0, 1] == pytest.approx(value, abs=1e-6)
    assert found[0, 0] != pytest.approx(value, abs=1e-3)


@by_way
def test_equal_rewards_give_advantages_of_exactly_zero(estimator, leave_one_out):
    leaves = [{**leaf, "reward": 0.1} for leaf in TREES["C2_binary_depth3_8leaves"]["leaves"]]
    found = advantages(make_tree(leaves[:7]), estimator, leave_one_out=leave_one_out)
    if estimator == "tree_grpo":
        assert (found == 0).all(), "all of these leaves share their first level with others"
    assert np.abs(found).max() < 1e-15


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_siblings_whose_values_differ_by_rounding_alone_are_equal(scale):
    """The children of the prompt have the same leaves in another order, so their means are added up in another one."""
    chances = np.random.default_rng(10).uniform(0.2, 1.0, 9)
    order = [0, *range(1, 10), 0, *range(9, 0, -1)]
    leaves = [
        {"path": (side, str(i)), "reward": scale / i, "segment_tokens": [4, 4]}
        for side, numbers in (("a", range(1, 10)), ("b", range(9, 0, -1)))
        for i in numbers
    ]
    tree = make_tree(leaves)
    segments = [
        replace(s, inclusion=chances[i - 1] if i else 1.0)
        for i, s in zip(order, tree.segments, strict=True)
    ]
    tree = replace(tree, segments=tuple(segments))
    value = advantages(tree, "spo")[[0, 9], 0]
    assert 0 < np.ptp(value) < 1e-12 * scale, "only rounding"
    found = advantages(tree, "treerpo")
    assert (found[:, 0] == 0).all()
    assert (found[:, 1] != 0).all()


@pytest.mark.parametrize("estimator", LEAVE_ONE_OUT)
def test_leaving_one_out_stretches_a_flat_group(estimator):
    tree = vector("C6_no_sharing_flat_group")
    found = advantages(tree, estimator, leave_one_out=True)
    assert np.allclose(found, advantages(tree, estimator) * 4 / 3)


def test_a_trajectory_of_twice_the_weight_counts_twice():
    """The weighted policy gradient of a tree is that of the tree in which the heavy leaf stands twice."""
    leaves = TREES["C6_no_sharing_flat_group"]["leaves"]
    tree = make_tree(leaves)
    heavy = replace(tree.segments[0], inclusion=0.5)
    found = advantages(replace(tree, segments=(heavy, *tree.segments[1:])), "treepo")
    twice = advantages(make_tree([*leaves, {**leaves[0], "path": ["e"]}]), "treepo")
    assert np.allclose(found * 5 / 4, [twice[0] + twice[4], *twice[1:4]])


def test_an_unknown_estimator_is_refused_by_name():
    with pytest.raises(ConfigError) as caught:
        advantages(vector("C1_binary_depth2"), "gae")
    assert str(caught.value) == f"learner.estimator=gae is not one of {', '.join(ESTIMATORS)}"


def test_unknown_path_weights_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"learner\.path_weights=fair is not one of equal, unb"):
        advantages(vector("C1_binary_depth2"), path_weights="fair")


@pytest.mark.parametrize("estimator", sorted(set(ESTIMATORS) - set(LEAVE_ONE_OUT)))
def test_leave_one_out_is_refused_where_it_has_no_meaning(estimator):
    with pytest.raises(
        ConfigError, match=rf"learner\.leave_one_out.*learner\.estimator={estimator}"
    ):
        advantages(vector("C1_binary_depth2"), estimator, leave_one_out=True)


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
    tree = vector("C1_binary_depth2")
    assert has_spread(replace(tree, accuracies_L=np.array(accuracies_L, "f4"))) is spread


@pytest.mark.parametrize(("accuracy", "spread"), [(1.0, True), (0.0, True), (np.nan, False)])
def test_a_lone_leaf_counts_as_spread_if_it_was_scored(accuracy, spread):
    tree = vector("C9_single_trajectory")
    assert has_spread(replace(tree, accuracies_L=np.array([accuracy], "f4"))) is spread


def test_a_pruned_path_beside_a_lone_trajectory_does_not_count_for_its_spread():
    tree = vector("C1_binary_depth2")
    pruned = [
        replace(s, stop=StopReason.PRUNED) if i in tree.leaves[1:] else s
        for i, s in enumerate(tree.segments)
    ]
    accuracies_L = np.array([1, np.nan, np.nan, np.nan], "f4")
    assert has_spread(replace(tree, segments=tuple(pruned), accuracies_L=accuracies_L))
    # where they are whole and could not be scored, one accuracy is no spread
    assert not has_spread(replace(tree, accuracies_L=accuracies_L))


def test_random_trees_have_groups_at_every_level_and_pruned_leaves():
    """Control: the property tests above are not about trees without forks."""
    trees = [any_tree(seed) for seed in range(20)]
    forked_levels = {
        tree.segments[parent].level
        for tree in trees
        for parent, count in Counter(s.parent for s in tree.segments).items()
        if parent != ROOT and count > 1
    }
    assert forked_levels >= {0, 1, 2}
    assert {s.stop for tree in trees for s in tree.segments} >= {None, StopReason.PRUNED}
