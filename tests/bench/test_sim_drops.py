import math

import numpy as np
import pytest

from treepo_async.bench.sim_drops import BEYOND, GAMMA, MOST, Drops, fit

CURVE = Drops(8, middle=16.0, scale=16.0, logits=(-1.0, 0.3, 1.5), last=32.0)


def logit(share):
    return math.log(share / (1 - share))


def test_a_share_that_never_changes_is_the_share_of_all():
    drops = fit([(step, 250, 750, 0) for step in range(1, 33)], 8)
    assert drops.logits == pytest.approx((logit(0.25), 0, 0), abs=1e-4)


def test_three_steps_are_met_by_the_curve_at_their_middles():
    counts = [(1, 60_000, 40_000, 0), (4, 20_000, 80_000, 0), (9, 50_000, 50_000, 0)]
    drops = fit(counts, 8)
    for step, dropped, accepted, _ in counts:
        assert drops.at(step - 0.5) == pytest.approx(dropped / (dropped + accepted), abs=1e-4)


def test_trees_stand_where_their_policy_stood_and_none_before_the_first_step():
    shares = {0.0: 0.6, 2.0: 0.2, 7.5: 0.5}
    counts = [(1, 60_000, 40_000, 0.75), (4, 20_000, 80_000, 1.5), (9, 50_000, 50_000, 1.0)]
    drops = fit(counts, 8)
    assert [drops.at(x) for x in shares] == pytest.approx([*shares.values()], abs=1e-4)


def test_the_curve_that_counts_were_drawn_from_is_found():
    rng = np.random.default_rng(0)
    drawn = [(step, int(rng.binomial(2000, CURVE.at(step - 0.5)))) for step in range(1, 33)]
    drops = fit([(step, number, 2000 - number, 0) for step, number in drawn], 8)
    assert drops.logits == pytest.approx(CURVE.logits, abs=0.1)


def test_steps_without_many_trees_weigh_less_than_those_with_them():
    counts = [(step, 10, 90, 0) for step in range(1, 33)]
    counts[16] = (17, 1, 0, 0)
    assert fit(counts, 8).at(16.5) < 0.15


def test_behind_the_last_step_the_logit_rises_half_as_fast_up_to_the_cap():
    last, before = (logit(CURVE.at(x)) for x in (32.0, 32.0 - 1e-5))
    slope = (last - before) / 1e-5
    assert logit(CURVE.at(34.0)) == pytest.approx(last + 2 * BEYOND * slope, abs=1e-4)
    assert CURVE.at(1000.0) == MOST


def test_a_step_of_larger_batches_is_worth_more_steps_and_one_of_the_same_is_worth_itself():
    assert CURVE.place(10.5, 8) == 10.5
    assert CURVE.place(10.5, 16) == pytest.approx(10.5 * 2**GAMMA)


@pytest.mark.parametrize(
    ("dropped", "accepted", "low", "high"), [(0, 100, 0, 1e-4), (100, 0, MOST, MOST)]
)
def test_a_run_that_drops_nothing_or_all_has_a_curve_too(dropped, accepted, low, high):
    drops = fit([(step, dropped, accepted, 0) for step in range(1, 33)], 8)
    assert all(low <= drops.at(x) <= high for x in (0.5, 16.0, 32.0, 60.0))
