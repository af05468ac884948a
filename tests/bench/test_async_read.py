import json

import pytest

from treepo_async.bench.async_read import read_run
from treepo_async.bench.async_summary import summarize
from treepo_async.errors import DataError


def record(step, **more):
    values = {
        "step": step,
        "time": 1000.0 + 10 * step,
        "reward/mean": 0.5,
        "tokens/unique": 60,
        "tokens/decoded": 120,
        "trees/accepted": 3,
        "trees/degenerate": 1,
        "trees/fallback_runs": 7,
        "trees/pruned_paths": 0,
        "staleness/mean": 0.25,
        "staleness/max": 1,
        "lag/0/tokens": 75,
        "lag/0/ess": 1.0,
        "lag/8+/tokens": 25,
        "lag/8+/ess": 0.5,
        "learner/ess": 0.9,
        "time/wait_batch_s": 4.0,
        "time/train_s": 5.0,
        "time/publish_s": 1.0,
        "time/wall_s": 10.0,
        "idle/learner": 0.4,
        "idle/engine": None,
        "weights/pause_s": None,
    }
    return values | more


def made_run(folder, records):
    evaluation = {"eval/sampled_accuracy": 0.75, "eval/greedy_accuracy": 1.0}
    records = [*records, {"step": 3, "time": 1045.0, **evaluation}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_steps_after_the_warm_up_become_rows_whose_time_begins_there(tmp_path):
    run = made_run(tmp_path, [record(1), record(2), record(3)])
    cell = read_run(run, arm="sync", seed=7, warm_up=1)
    assert [(row.step, row.seconds, row.seed) for row in cell.steps] == [(2, 10.0, 7), (3, 20.0, 7)]
    row = cell.steps[0]
    assert (row.trained_tokens, row.trained_tokens_unique) == (100, 60)
    assert (row.decoded_tokens, row.discarded_tokens) == (120, 30)
    assert (row.lag_tokens, row.lag_ess) == ("0=0.75 8=0.25", "0=1 8=0.5")
    assert (row.wait_batch_s, row.train_s, row.publish_s) == (4.0, 5.0, 1.0)
    assert [(e.step, e.seconds, e.accuracy) for e in cell.evals] == [(3, 35.0, 0.75)]


def test_of_a_step_that_was_trained_again_the_later_record_counts(tmp_path):
    run = made_run(tmp_path, [record(1), record(2), record(2, **{"reward/mean": 0.75})])
    cell = read_run(run, arm="sync", seed=0, warm_up=1)
    assert [row.reward for row in cell.steps] == [0.75]


def test_the_ledgers_of_a_run_are_its_shares_of_the_time(tmp_path):
    shares = {"ledger/actor/compute": 0.75, "ledger/actor/wait_data": 0.25}
    run = made_run(tmp_path, [record(1), record(2, **shares), record(3, **shares)])
    cell = read_run(run, arm="sync", seed=0, warm_up=1)
    found = {(row.role, row.account): row.seconds for row in cell.ledger}
    assert (found["actor", "compute"], found["actor", "wait_data"]) == (15.0, 5.0)
    assert (found["learner", "wait_data"], found["learner", "compute"]) == (8.0, 12.0)
    assert summarize([cell])[0].actor_idle == 0.25


def test_a_folder_without_enough_steps_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_run(tmp_path, arm="sync", seed=0, warm_up=1)
    run = made_run(tmp_path, [record(1)])
    with pytest.raises(DataError, match="has 1 steps, none after the first 1"):
        read_run(run, arm="sync", seed=0, warm_up=1)
