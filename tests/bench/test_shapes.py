import random
from dataclasses import replace

import pytest

from tests.tree.scripted import RULES, ScriptedEngine, grow
from treepo_async.bench.shapes import decoded_share, paths_per_level, reaches_width
from treepo_async.types import leaves_of

DEPTHS = (3, 4, 5, 7, 14, 28, 56)
PRINTED = {
    (16, 2): (0.292, 0.469, 0.575, 0.696, 0.848, 0.924, 0.962),
    (16, 8): (0.833, 0.875, None, 0.929, 0.964, 0.982, 0.991),
    (64, 2): (0.073, 0.117, 0.194, 0.424, 0.712, 0.856, 0.928),
    (64, 8): (0.292, 0.469, None, 0.696, 0.848, 0.924, 0.962),
}
"""Decoded over full-length tokens by width and first fork, for binary trees of these depths, to three digits."""
SHAPES = [
    (width, depth, first_fork, share)
    for (width, first_fork), shares in PRINTED.items()
    for depth, share in zip(DEPTHS, shares, strict=True)
    if share is not None
]


def decoded_and_leaves(width, depth, first_fork, *, fallback, segment_tokens=3):
    rules = replace(
        RULES,
        segment_tokens=segment_tokens,
        max_depth=depth,
        width=width,
        first_fork_min=first_fork,
        first_fork_max=first_fork,
        fallback=fallback,
    )
    growth, _ = grow(rules, ScriptedEngine(random.Random(0)))
    segments = growth.tree.segments
    return sum(map(len, segments)), len(leaves_of(tuple(segments)))


@pytest.mark.parametrize(("width", "depth", "first_fork", "share"), SHAPES)
def test_the_closed_form_gives_every_printed_share(width, depth, first_fork, share):
    assert round(decoded_share(width, depth, 2, first_fork), 3) == share


@pytest.mark.parametrize(("width", "depth", "first_fork", "share"), SHAPES)
def test_a_full_length_tree_decodes_what_the_closed_form_says(width, depth, first_fork, share):
    decoded, _ = decoded_and_leaves(width, depth, first_fork, fallback="none")
    assert decoded == 3 * sum(paths_per_level(width, depth, 2, first_fork))
    assert decoded / (3 * width * depth) == decoded_share(width, depth, 2, first_fork)


@pytest.mark.parametrize(("width", "depth", "first_fork", "share"), SHAPES)
def test_a_tree_needs_fallback_exactly_where_it_does_not_reach_its_width(
    width, depth, first_fork, share
):
    with_it = decoded_and_leaves(width, depth, first_fork, fallback="random")
    without = decoded_and_leaves(width, depth, first_fork, fallback="none")
    assert with_it[1] == width
    assert (with_it == without) == reaches_width(width, depth, 2, first_fork)


def test_independent_responses_decode_all_they_deliver():
    assert decoded_share(16, 7, 1, 16) == 1
