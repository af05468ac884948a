from collections import Counter

import numpy as np
import pytest

from tests.oracle import random_tree
from treepo_async.bench.learner_cells import Branching, parse
from treepo_async.bench.learner_trees import fork_levels, padded, trees_of
from treepo_async.types import StopReason
from treepo_async.wire.tree_line import encode_line


def cell(**sizes):
    words = {"branching": "early", "width": 16, "segment": 4, "prompt": 3} | sizes
    (found,) = parse([f"{key}={value}" for key, value in words.items()]).cells
    return found


def segments_per_level(tree):
    counts = Counter(segment.level for segment in tree.segments)
    return [counts[level] for level in range(len(counts))]


@pytest.mark.parametrize(
    ("branching", "levels"),
    [
        ("early", [2, 4, 8, 16, 16, 16, 16]),
        ("spread", [2, 2, 4, 4, 8, 8, 16]),
        ("late", [1, 1, 1, 2, 4, 8, 16]),
    ],
)
def test_made_trees_fork_where_their_branching_says(branching, levels):
    (tree,) = trees_of(cell(branching=branching), 100)
    tree.check()
    assert segments_per_level(tree) == levels
    assert len(tree.prompt.token_ids) == 3
    assert tree.num_tokens == 4 * sum(levels)


@pytest.mark.parametrize("branching", ["early", "spread", "late"])
@pytest.mark.parametrize("width", [2, 8, 64, 128])
def test_every_width_has_as_many_levels_that_fork_as_it_takes(branching, width):
    levels = fork_levels(branching, width, 7)
    assert len(set(levels)) == len(levels) == width.bit_length() - 1
    assert all(0 <= level < 7 for level in levels)


def test_paths_that_end_early_hand_their_forks_to_others():
    trees = trees_of(cell(branching="treepo", prompts=6, width=12, segment=8), 100)
    for tree in trees:
        tree.check()
    leaves = [len(tree.leaves) for tree in trees]
    assert leaves.count(12) >= 4
    assert max(leaves) == 12
    lengths = [n for tree in trees for n in tree.num_tokens_L]
    assert len(set(lengths)) > 5
    stops = {tree.segments[leaf].level for tree in trees for leaf in tree.leaves}
    assert min(stops) >= 2


def test_the_same_cell_has_the_same_trees_and_each_of_them_other_tokens():
    first, second = (trees_of(cell(prompts=2), 100) for _ in range(2))
    assert [t.prompt.token_ids.tolist() for t in first] == [
        t.prompt.token_ids.tolist() for t in second
    ]
    a, b = (tree.segments[0].token_ids.tolist() for tree in first)
    assert a != b
    assert max(max(a), max(b)) < 100


def test_trees_of_a_file_are_its_first(tmp_path):
    rng = np.random.default_rng(0)
    trees = [random_tree(rng) for _ in range(3)]
    file = tmp_path / "trees.jsonl"
    file.write_bytes(b"".join(encode_line(tree) + b"\n" for tree in trees))
    (read,) = parse([f"trees={file}", "prompts=2"]).cells
    found = trees_of(read, 128)
    assert read.branching is Branching.FILE
    assert [tree.prompt.id for tree in found] == [tree.prompt.id for tree in trees[:2]]


def test_padding_makes_every_trajectory_a_row_as_long_as_the_longest():
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, num_segments=10) for _ in range(2)]
    rows = padded(trees)
    assert len(rows) == sum(len(tree.leaves) for tree in trees)
    longest = max(len(tree.prompt.token_ids) + max(tree.num_tokens_L) for tree in trees)
    assert {len(row.prompt.token_ids) + row.num_tokens for row in rows} == {longest}
    first = trees[0]
    path = first.path(first.leaves[0])
    assert [s.token_ids.tolist() for s in rows[0].segments] == [
        first.segments[i].token_ids.tolist() for i in path
    ]
    assert rows[0].prompt.token_ids.tolist()[-len(first.prompt.token_ids) :] == (
        first.prompt.token_ids.tolist()
    )
    for row in rows:
        row.check()
        assert len(row.leaves) == 1
        assert row.segments[-1].stop in (StopReason.EOS, StopReason.LENGTH)
