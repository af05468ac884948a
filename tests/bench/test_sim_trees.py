import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from treepo_async.bench.shapes import decoded_share
from treepo_async.bench.sim_trees import GROWTHS, LogNormal, Seen, TreeShape, draw_plan


@settings(deadline=None)
@given(
    growth=st.sampled_from(GROWTHS),
    width=st.integers(1, 12),
    depth=st.integers(1, 6),
    median=st.integers(1, 60),
    seed=st.integers(0, 50),
)
def test_a_plan_has_as_many_leaves_as_its_width_and_parents_before_children(
    growth, width, depth, median, seed
):
    shape = TreeShape(8, depth, width, growth=growth)
    plan = draw_plan(shape, LogNormal(median, 3), random.Random(seed))
    parents = [request.parent for request in plan.requests]
    ends = [
        request.begin + request.tokens
        for place, request in enumerate(plan.requests)
        if place not in parents
    ]
    assert len(ends) == width
    assert sum(ends) == plan.leaf_tokens
    for place, request in enumerate(plan.requests):
        assert request.parent < place
        assert 0 < request.tokens <= shape.response_tokens - request.begin
        before = plan.requests[request.parent] if request.parent >= 0 else None
        assert request.begin == (before.begin + before.tokens if before else 0)
        assert request.round == (before.round + 1 if before else request.round)


def test_paths_that_never_end_decode_the_share_that_follows_from_the_shape():
    plan = draw_plan(TreeShape(10, 7, 16), Seen((1000,)), random.Random(0))
    assert plan.tokens / plan.leaf_tokens == pytest.approx(decoded_share(16, 7, 2, 2))


def test_the_tail_of_a_lognormal_is_what_its_name_says():
    rng = random.Random(0)
    drawn = sorted(LogNormal(100, 10).draw(0, rng) for _ in range(20_000))
    assert drawn[10_000] == pytest.approx(100, rel=0.05)
    assert drawn[19_800] == pytest.approx(1000, rel=0.15)


@pytest.mark.parametrize("lengths", [LogNormal(20, 5), Seen(tuple(range(1, 100)))])
def test_a_length_that_is_drawn_is_longer_than_where_its_path_stands(lengths):
    rng = random.Random(1)
    assert all(lengths.draw(above, rng) > above for above in range(98) for _ in range(20))


def test_what_is_longer_than_all_that_was_seen_never_ends_by_itself():
    assert Seen((3, 5)).draw(5, random.Random(0)) == float("inf")
