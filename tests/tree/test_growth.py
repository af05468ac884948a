import random
from collections import Counter
from dataclasses import replace

import pytest

from tests.tree.scripted import RULES, ScriptedEngine, grow, tree_of
from treepo_async.tree.growth import start_growth
from treepo_async.types import ROOT, StopReason


def test_an_answered_path_is_forked_again_at_each_of_its_boundaries():
    rules = replace(RULES, width=2, first_fork_min=1, first_fork_max=1, branching_factor=1)
    found = Counter()
    for seed in range(200):
        growth = start_growth(rules, random.Random(seed))
        run, _ = ScriptedEngine(random.Random(0)).run(4)
        (extension,) = growth.start()
        for level in range(4):
            stop = StopReason.EOS if level == 3 else None
            (extension,) = growth.add(extension, run, stop)
        fallback = extension
        assert fallback.start == 4 * (fallback.parent + 1)
        found[fallback.start] += 1
    assert set(found) == {0, 4, 8, 12}
    assert min(found.values()) > 25


def test_without_an_answer_to_come_back_to_the_prompt_is_started_again():
    engine = ScriptedEngine(random.Random(0), stop_rate=1.0, reasons=(StopReason.REPETITION,))
    _, rounds = grow(replace(RULES, width=5), engine)
    planned = [[(e.parent, e.num_runs) for e in r.extensions] for r in rounds]
    assert planned == [[(ROOT, 2)], [(ROOT, 2)], [(ROOT, 1)]]


def test_without_fallback_a_tree_that_ends_early_stays_small_and_says_so():
    engine = ScriptedEngine(random.Random(0), stop_rate=1.0)
    growth, rounds = grow(replace(RULES, fallback="none"), engine)
    assert len(rounds) == 1
    assert growth.notes() == ("14 leaves fewer than the width: fallback is off",)
    assert growth.num_fallbacks == 0


@pytest.mark.parametrize(("low", "high"), [(2, 2), (1, 3), (2, 8)])
def test_the_first_fork_is_drawn_evenly_from_its_range(low, high):
    rules = replace(RULES, first_fork_min=low, first_fork_max=high)
    drawn = Counter(start_growth(rules, random.Random(s)).start()[0].num_runs for s in range(700))
    assert set(drawn) == set(range(low, high + 1))
    assert min(drawn.values()) > 0.6 * 700 / len(drawn)


def test_the_remainder_of_a_split_is_spread_over_all_survivors():
    """Width 11 from 2, 4, 8 paths: three of eight get a second fork, not always the same ones."""
    lucky = Counter()
    for seed in range(100):
        _, rounds = grow(replace(RULES, width=11), ScriptedEngine(random.Random(0)), seed)
        shares = [e.num_runs for e in rounds[3].extensions]
        assert sorted(shares) == [1] * 5 + [2] * 3
        lucky.update(i for i, share in enumerate(shares) if share == 2)
    assert set(lucky) == set(range(8))
    assert max(lucky.values()) < 70


def test_the_forks_of_a_path_that_ended_go_to_its_siblings():
    growth = start_growth(replace(RULES, first_fork_min=4, first_fork_max=4), random.Random(0))
    (extension,) = growth.start()
    engine = ScriptedEngine(random.Random(0))
    stops = (StopReason.EOS, None, StopReason.EOS, None)
    *_, planned = [growth.add(extension, engine.run(4)[0], stop) for stop in stops]
    assert [(e.parent, e.num_runs) for e in planned] == [(1, 4), (3, 4)]


def test_another_seed_grows_another_tree():
    shapes = {
        tuple(
            s.parent
            for s in grow(replace(RULES, width=11), ScriptedEngine(random.Random(0)), seed)[
                0
            ].tree.segments
        )
        for seed in range(20)
    }
    assert len(shapes) > 10


@pytest.mark.parametrize(
    ("width", "first_fork", "max_depth", "share"),
    [
        (16, 2, 4, 0.469),
        (16, 2, 5, 0.575),
        (16, 2, 7, 0.696),
        (16, 2, 14, 0.848),
        (16, 2, 28, 0.924),
        (16, 2, 56, 0.962),
        (16, 8, 3, 0.833),
        (16, 8, 7, 0.929),
        (64, 2, 7, 0.424),
        (64, 2, 14, 0.712),
        (64, 2, 28, 0.856),
        (64, 2, 56, 0.928),
        (64, 8, 4, 0.469),
        (64, 8, 14, 0.848),
    ],
)
def test_full_length_trees_decode_the_share_of_the_closed_form(width, first_fork, max_depth, share):
    rules = replace(
        RULES,
        width=width,
        max_depth=max_depth,
        first_fork_min=first_fork,
        first_fork_max=first_fork,
    )
    growth, rounds = grow(rules, ScriptedEngine(random.Random(0)))
    tree = tree_of(growth)
    levels = [min(width, first_fork * 2**k) for k in range(max_depth)]
    assert tree.num_tokens == rules.segment_tokens * sum(levels)
    assert tree.num_delivered_tokens == rules.limit * width
    assert tree.num_tokens / tree.num_delivered_tokens == pytest.approx(share, abs=6e-4)
    assert len(rounds) == levels.index(width) + 1, "saturated paths run to completion"
    assert growth.num_fallbacks == 0


@pytest.mark.parametrize("width", [16, 64])
def test_a_tree_too_shallow_for_its_width_starts_again_at_the_prompt(width):
    """Depth 3 holds 2, 4, 8 paths; nothing is shared across the restarts that fill the width."""
    growth, _ = grow(replace(RULES, width=width, max_depth=3), ScriptedEngine(random.Random(0)))
    tree = tree_of(growth)
    assert len(tree.leaves) == width
    assert tree.num_tokens / tree.num_delivered_tokens == pytest.approx(14 / 24)


@pytest.mark.parametrize(
    ("max_response_tokens", "limit", "reason"),
    [
        (None, 24, StopReason.LENGTH),
        (10, 10, StopReason.LENGTH),
        (24, 24, StopReason.LENGTH),
        (25, 24, StopReason.DEPTH),
    ],
)
def test_the_nearer_of_length_and_depth_limits_a_path(max_response_tokens, limit, reason):
    rules = replace(RULES, max_response_tokens=max_response_tokens)
    growth, _ = grow(rules, ScriptedEngine(random.Random(0)))
    tree = tree_of(growth)
    assert (rules.limit, rules.limit_reason) == (limit, reason)
    assert {tree.segments[leaf].stop for leaf in tree.leaves} == {reason}
    assert set(tree.num_tokens_L) == {limit}


def test_an_answer_on_the_last_token_allowed_is_an_answer():
    growth = start_growth(
        replace(RULES, width=1, first_fork_min=1, first_fork_max=1), random.Random(0)
    )
    (extension,) = growth.start()
    run, _ = ScriptedEngine(random.Random(0)).run(24)
    assert growth.add(extension, run, StopReason.BOXED) == []
    assert growth.tree.segments[-1].stop is StopReason.BOXED


def test_a_tree_does_not_depend_on_the_order_in_which_requests_come_back():
    def grown(order):
        growth = start_growth(RULES, random.Random(0))
        (first,) = growth.start()
        engine = ScriptedEngine(random.Random(0))
        growth.add(first, engine.run(4)[0], None)
        requests = growth.add(first, engine.run(4)[0], None)
        runs = [engine.run(4)[0] for _ in range(4)]
        for i in order:
            growth.add(requests[i], runs[2 * i], None)
            growth.add(requests[i], runs[2 * i + 1], None)
        return [(s.parent, s.token_ids.tolist()) for s in growth.tree.segments]

    assert len(grown([0, 1])) == 6
    assert grown([0, 1]) == grown([1, 0])
