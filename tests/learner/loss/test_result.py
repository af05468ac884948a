"""Means of sums, and several updates as one."""

import json
import math
from dataclasses import asdict, replace

import pytest

from treepo_async.learner.loss.result import merge, result_of
from treepo_async.learner.loss.statistics import COLUMNS, LAGS, LEVELS, SUMS

UPDATE = {"grad_norm": 1.0, "learning_rate": 1e-4, "skipped": False}


def sums_of(rows, **totals):
    """A vector whose tokens are in the given rows of lag, as (weight, is clipped, is masked) each, all on level 2."""
    sums = dict.fromkeys(SUMS, 0.0)
    for lag, tokens in rows.items():
        for weight, clipped, masked in tokens:
            values = (1, weight, weight**2, 0.1 * weight, clipped, masked)
            for column, value in zip(COLUMNS, values, strict=True):
                sums[f"lag/{lag}/{column}"] += value
                sums[f"level/2/{column}"] += value
    count = sum(map(len, rows.values()))
    return sums | {"trajectory_tokens": count, "trained_tokens": count} | totals


FIRST = sums_of(
    {"0": [(1.0, 0, 0), (1.0, 1, 0)], "3": [(0.5, 0, 0), (2.0, 1, 0), (0.0, 0, 1)]},
    loss=0.5,
    policy_loss=0.25,
    capped=1,
    entropy=5.0,
    gap=0.3,
    compared=2,
    microbatches=1,
)
SECOND = sums_of(
    {"3": [(1.5, 0, 0)], "8+": [(0.0, 0, 1)], "unknown": [(1.0, 0, 0)]},
    loss=-0.1,
    policy_loss=-0.2,
    entropy=6.0,
    kl_reference=0.9,
    referenced=3,
    microbatches=2,
)


def test_means_are_per_trajectory_token():
    found = result_of(FIRST, 0.25, **UPDATE)
    assert found.num_trajectory_tokens == 5
    assert found.correction_weight_mean == pytest.approx(4.5 / 5)
    assert found.correction_capped_share == pytest.approx(1 / 5)
    assert found.clipped_share == pytest.approx(2 / 5)
    assert found.masked_share == pytest.approx(1 / 5)
    assert found.kl_behavior == pytest.approx(0.45 / 5)
    assert found.entropy == pytest.approx(1.0)
    assert (found.loss, found.policy_loss) == (0.5, 0.25)
    assert found.ess == pytest.approx(4.5**2 / (5 * 6.25))
    assert (found.logprob_gap_mean, found.logprob_gap_max) == (pytest.approx(0.15), 0.25)
    assert math.isnan(found.kl_reference), "there is no reference"
    assert result_of(SECOND, 0.0, **UPDATE).kl_reference == pytest.approx(0.3)


def test_rows_are_those_that_have_tokens():
    found = result_of(FIRST, 0.0, **UPDATE)
    assert list(found.by_lag) == ["0", "3"]
    assert list(found.by_level) == ["2"]
    assert found.by_lag["3"] == {
        "tokens": 3,
        "ess": pytest.approx(2.5**2 / (3 * 4.25)),
        "weight": pytest.approx(2.5 / 3),
        "kl_behavior": pytest.approx(0.25 / 3),
        "clipped": pytest.approx(1 / 3),
        "masked": pytest.approx(1 / 3),
    }
    assert found.by_lag["0"]["ess"] == 1.0


def test_a_row_whose_tokens_are_all_masked_has_no_effective_sample_size():
    row = result_of(SECOND, 0.0, **UPDATE).by_lag["8+"]
    assert (row["tokens"], row["weight"], row["masked"]) == (1, 0.0, 1.0)
    assert math.isnan(row["ess"])


def test_updates_merge_into_what_their_added_sums_give():
    results = [result_of(sums, 0.1, **UPDATE) for sums in (FIRST, SECOND)]
    together = result_of({n: FIRST[n] + SECOND[n] for n in SUMS}, 0.1, **UPDATE)
    merged = merge(results)
    for name in ("ess", "correction_weight_mean", "clipped_share", "masked_share", "kl_behavior"):
        assert getattr(merged, name) == pytest.approx(getattr(together, name), rel=1e-12), name
    for name in ("by_lag", "by_level"):
        rows, expected = getattr(merged, name), getattr(together, name)
        assert list(rows) == list(expected)
        for key, row in rows.items():
            assert row == pytest.approx(expected[key], rel=1e-12, nan_ok=True)
    assert merged.loss == pytest.approx(0.2), "the mean over updates"
    assert merged.policy_loss == pytest.approx(0.025)
    assert merged.kl_reference == pytest.approx(0.3), "over the updates that have one"
    assert merged.num_microbatches == 3
    assert merged.num_trajectory_tokens == 8


def test_one_update_merges_into_itself():
    for sums in (FIRST, SECOND):
        one = result_of(sums, 0.1, **UPDATE)
        merged = merge([one])
        for name, value in asdict(one).items():
            if not isinstance(value, dict):
                assert getattr(merged, name) == pytest.approx(value, nan_ok=True), name
        assert merged.by_lag.keys() == one.by_lag.keys()


def test_a_skipped_update_is_counted_and_spoils_no_mean():
    one = result_of(FIRST, 0.1, **UPDATE)
    spoilt = replace(one, loss=math.nan, grad_norm=math.inf, num_skipped=1)
    merged = merge([one, spoilt, one])
    assert (merged.num_skipped, merged.num_updates) == (1, 3)
    assert (merged.loss, merged.grad_norm) == (one.loss, one.grad_norm)
    assert merge([one, one]).num_skipped == 0


def test_the_mean_gap_is_that_over_the_fresh_tokens_of_all_updates():
    one = result_of(FIRST, 0.1, **UPDATE)
    many = replace(one, logprob_gap_mean=0.5, num_compared_tokens=3 * one.num_compared_tokens)
    expected = (one.logprob_gap_mean + 3 * 0.5) / 4
    assert merge([one, many]).logprob_gap_mean == pytest.approx(expected)


def test_a_batch_without_trained_tokens_has_no_loss_and_no_rows():
    found = merge([result_of(dict.fromkeys(SUMS, 0.0), 0.0, **UPDATE)] * 2)
    assert math.isnan(found.loss)
    assert math.isnan(found.policy_loss)
    assert math.isnan(found.ess)
    assert (found.by_lag, found.by_level) == ({}, {})


def test_a_result_goes_through_json():
    found = json.loads(json.dumps(asdict(result_of(FIRST, 0.1, **UPDATE))))
    assert found["by_lag"]["0"]["tokens"] == 2
    assert set(found["by_lag"]) <= set(LAGS)
    assert set(found["by_level"]) <= set(LEVELS)
