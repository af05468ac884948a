import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from tests.tree.vectors import recut, vector
from treepo_async.tree.levels import BEHIND, PROMPT, Levels, level_tokens, num_levels


def test_a_level_ends_in_one_node_that_its_trajectories_share():
    levels = Levels.of(vector("C3_ragged_early_stop"))
    nodes = levels.nodes_LD
    assert nodes[0, 1:].tolist() == [BEHIND, BEHIND]
    assert nodes[1, 0] == nodes[2, 0] == nodes[3, 0] != nodes[0, 0]
    assert nodes[2, 1] == nodes[3, 1] != nodes[1, 1]
    assert len({*nodes[:, 2]} - {BEHIND}) == 2
    assert levels.parent_N[nodes[:, 0]].tolist() == [PROMPT] * 4
    assert levels.parent_N[nodes[2:, 2]].tolist() == nodes[2:, 1].tolist()


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_cuts_inside_of_levels_make_no_nodes(seed):
    tree = random_tree(np.random.default_rng(seed), num_segments=20)
    finer = recut(tree, np.random.default_rng(seed))
    assert len(finer.segments) >= len(tree.segments)
    (_, before), (_, after) = (
        np.unique(Levels.of(t).nodes_LD, return_inverse=True) for t in (tree, finer)
    )
    np.testing.assert_array_equal(after, before)


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_tokens_of_levels_add_up_to_those_of_trajectories(seed):
    tree = random_tree(np.random.default_rng(seed), num_segments=20)
    found = level_tokens(tree)
    assert found.shape == (len(tree.leaves), num_levels(tree))
    for leaf, segment in enumerate(tree.leaves):
        expected = [0] * num_levels(tree)
        for i in tree.path(segment):
            expected[tree.segments[i].level] += len(tree.segments[i])
        assert found[leaf].tolist() == expected
