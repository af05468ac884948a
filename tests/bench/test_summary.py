from dataclasses import replace

import pytest

from tests.bench.made import CELL, pair
from treepo_async.bench.summary import Spread, cells_of, pairs_of, summarize

PAIRS = [pair(1, 2.0, 3.0), pair(2, 4.0, 4.0), pair(3, 1.0, 2.0)]


def test_the_speed_up_is_the_median_of_the_pairs_own_ratios():
    summary = summarize(PAIRS)
    # the ratio of the medians would be 1.5 too, the medians of times being 2 and 3; so tell them apart
    assert summary.speed_up == Spread(1.5, 1.0, 2.0)
    assert summarize([pair(1, 1.0, 2.0), pair(2, 2.0, 8.0), pair(3, 4.0, 5.0)]).speed_up == Spread(
        2.0, 1.25, 4.0
    )


def test_tokens_per_second_are_compared_pair_by_pair_as_well():
    gain = summarize([pair(1, 2.0, 2.0)]).token_gain
    assert gain.median == pytest.approx((240 + 80) / (200 + 80))


def test_processor_time_has_a_ratio_of_its_own():
    assert summarize([pair(1, 2.0, 2.0, engine_cpu_s=0.6)]).cpu_speed_up.median == pytest.approx(4)


def test_the_limit_is_what_decoded_tokens_alone_would_give():
    summary = summarize(PAIRS)
    assert summary.limit == 240 / 120
    assert summary.share_of_limit == 1.5 / 2
    uneven = [pair(1, 2.0, 3.0), pair(2, 2.0, 3.0, decoded_tokens=180)]
    assert summarize(uneven).limit == 480 / 300


def test_figures_of_each_arm_are_medians_with_their_range():
    summary = summarize(PAIRS)
    assert summary.tree("wall_s") == Spread(2.0, 1.0, 4.0)
    assert summary.independent("wall_s") == Spread(3.0, 2.0, 4.0)
    assert summary.tree("trajectories_per_s") == Spread(4.0, 2.0, 8.0)
    assert summary.independent("decoded_tokens") == Spread(200, 200, 200)


def test_the_share_from_the_cache_is_over_all_children_of_all_pairs():
    pairs = [pair(1, 1, 1), pair(2, 1, 1, child_servable_tokens=800, child_cached_tokens=400)]
    assert summarize(pairs).child_cached_share == (190 + 400) / (200 + 800)
    assert summarize([pair(1, 1, 1, child_servable_tokens=0)]).child_cached_share is None


def test_only_whole_pairs_count_and_cells_stay_apart():
    other = replace(CELL, width=8)
    half = replace(PAIRS[1][0], cell=other)
    samples = [*PAIRS[2], *PAIRS[0], PAIRS[1][0], half]
    assert pairs_of(samples, CELL) == [PAIRS[0], PAIRS[2]]
    assert pairs_of(samples, other) == []
    assert cells_of(samples) == [CELL]
