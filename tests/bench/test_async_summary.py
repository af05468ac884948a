from math import isnan, nan

import pytest

from tests.bench.made_async import cell, step_row
from treepo_async.bench import async_plot, async_report
from treepo_async.bench.async_rows import Arm, CellData
from treepo_async.bench.async_summary import (
    Spread,
    by_arm,
    lag_ess,
    lag_shares,
    quantile,
    ratio,
    summarize,
)


def test_rates_and_shares_of_a_cell_are_those_of_its_rows():
    (found,) = summarize([cell()])
    assert (found.tokens_per_s, found.unique_per_s, found.step_s) == (50.0, 30.0, 2.0)
    assert (found.wait_batch_s, found.train_s) == (1.0, 1.0)
    assert (found.learner_idle, found.actor_idle) == (0.25, 0.1)
    assert isnan(found.engine_idle)
    assert (found.waste, found.accuracy, found.staleness_max) == (0.25, 0.75, 1)
    assert (found.pause_p50_s, found.pause_p95_s) == (0.1, 0.1)


def test_the_time_to_as_many_tokens_as_every_cell_has_lies_between_two_steps():
    slow, fast = cell(rewards=(0.0,) * 5), cell(arm="async", step_s=1.0, trained_tokens=150)
    found = {summary.arm: summary.to_tokens_s for summary in summarize([slow, fast])}
    # 500 tokens: three steps of 150, and a third of the fourth
    assert found == {"sync": 10.0, "async": pytest.approx(3 + 1 / 3)}


def test_the_time_to_a_reward_is_to_the_least_that_a_cell_ends_with_over_five_steps():
    low = cell(rewards=(0.0,) * 6)
    high = cell(arm="async", step_s=1.0, rewards=(-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    found = {summary.arm: summary.to_reward_s for summary in summarize([low, high])}
    assert found == {"sync": 10.0, "async": 5.0}


def test_without_rewards_there_is_no_time_to_one():
    (found,) = summarize([cell(rewards=(nan,) * 6)])
    assert isnan(found.reward)
    assert isnan(found.to_reward_s)


def test_a_ratio_is_taken_seed_by_seed():
    cells = [cell(seed=0), cell(seed=1, step_s=4.0)]
    cells += [cell("async", seed=0, step_s=1.0), cell("async", seed=1, step_s=1.0)]
    cells += [cell("async", seed=2, step_s=1e-3)]
    found = ratio(by_arm(summarize(cells)), Arm.ASYNC, Arm.SYNC)
    assert (found.mean, found.sd) == (3.0, pytest.approx(2**0.5))


def test_a_spread_leaves_out_what_is_not_known():
    assert Spread.of([1.0, nan, 3.0]).mean == 2.0
    assert isnan(Spread.of([nan]).mean)
    assert isnan(Spread.of([1.0]).sd)


def test_a_quantile_is_the_least_value_that_so_many_do_not_exceed():
    assert [quantile([3, 1, 2, 4], share) for share in (0.5, 0.95, 0.0)] == [2, 4, 1]
    assert isnan(quantile([], 0.5))


def test_lags_are_weighted_with_the_tokens_of_their_steps():
    rows = [
        step_row(1, 1.0, trained_tokens=300, lag_tokens="0=1", lag_ess="0=1"),
        step_row(2, 2.0, trained_tokens=100, lag_tokens="0=0.5 2=0.5", lag_ess="0=0.5 2=0.8"),
    ]
    assert lag_shares(rows) == {0: 350 / 400, 2: 50 / 400}
    assert lag_ess(rows) == {0: 0.75, 2: 0.8}


def test_the_tables_have_each_arm_against_both_synchronous_ones_and_what_it_adds():
    cells = [cell("sync2", step_s=1.0), cell("sync"), cell("async", step_s=0.5)]
    cells += [cell("async_inflight", step_s=0.25)]
    text = async_report.text(cells, summarize(cells))
    assert "| sync2 | 2.00 | 1.00 | - | - | - |" in text
    assert "| sync | 1.00 | 0.50 | - | - | - |" in text
    assert "| async | 4.00 | 2.00 | overlap + staleness | 4.00 | 4.00 |" in text
    assert "| async_inflight | 8.00 | 4.00 | in-flight updates | 2.00 | 2.00 |" in text
    assert "| learner | sync | 75.0% | 25.0% |" in text
    assert "| sync | 50.0% (ESS 1.000) | 50.0% (ESS 0.900) |" in text


def test_a_rung_whose_trees_have_another_shape_is_told_in_unique_tokens_too():
    eager = cell("async_eager", trained_tokens=200, trained_tokens_unique=30)
    cells = [cell("sync"), cell("async_inflight"), eager]
    text = async_report.text(cells, summarize(cells))
    assert "| async_eager | 2.00 | - | no barrier in a tree | 2.00 | 0.50 |" in text


def test_a_column_of_which_nothing_is_known_is_left_out():
    cells = [CellData(cell(rewards=(nan,) * 6).steps)]
    head = async_report.text(cells, summarize(cells)).splitlines()[0]
    assert "trained tokens/s" in head
    assert "reward" not in head
    assert "idle" not in head


def test_the_picture_is_a_picture_with_and_without_rewards(tmp_path):
    for rewards in ((0.0,) * 6, (nan,) * 6):
        cells = [cell(rewards=rewards), cell("async", rewards=rewards)]
        file = tmp_path / "plot.png"
        async_plot.draw(file, cells, summarize(cells))
        assert file.read_bytes().startswith(b"\x89PNG")
        file.unlink()
