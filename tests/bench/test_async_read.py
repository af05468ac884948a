import json

import pytest

from treepo_async.bench.async_read import read_run
from treepo_async.bench.async_rows import Account
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
        "learner/lineage": 0,
        "time/wait_batch_s": 4.0,
        "time/train_s": 4.5,
        "time/ack_s": 0.25,
        "time/publish_s": 1.0,
        "time/other_s": 0.25,
        "time/wall_s": 10.0,
        "weights/pause_s": None,
    }
    return values | more


def made_run(folder, records, *, staleness=0):
    replay = {"max_staleness": staleness, "prompts_per_batch": 4}
    (folder / "config.yaml").write_text(json.dumps({"replay": replay}))
    evaluation = {"eval/sampled_accuracy": 0.75, "eval/greedy_accuracy": 1.0}
    records = [*records, {"step": 3, "time": 1045.0, **evaluation}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_steps_after_the_warm_up_become_rows_whose_time_begins_there(tmp_path):
    run = made_run(tmp_path, [record(1), record(2), record(3)])
    cell = read_run(run, arm="sync", seed=7, warm_up=1, last=3)
    assert [(row.step, row.seconds, row.seed) for row in cell.steps] == [(2, 10.0, 7), (3, 20.0, 7)]
    row = cell.steps[0]
    assert (row.trained_tokens, row.trained_tokens_unique) == (100, 60)
    assert (row.decoded_tokens, row.discarded_tokens) == (120, 30)
    assert (row.lag_tokens, row.lag_ess) == ("0=0.75 8=0.25", "0=1 8=0.5")
    assert (row.wait_batch_s, row.train_s, row.publish_s) == (4.0, 4.5, 1.0)
    assert [(e.step, e.seconds, e.accuracy) for e in cell.evals] == [(3, 35.0, 0.75)]


def test_steps_in_which_only_stock_is_trained_are_in_no_rate(tmp_path):
    made = [record(1), record(2), record(3), record(4, **{"time/wall_s": 1.0, "trees/accepted": 0})]
    run = made_run(tmp_path, made, staleness=1)
    cell = read_run(run, arm="async", seed=0, warm_up=1, last=3)
    assert [row.step for row in cell.steps] == [2, 3]
    (found,) = summarize([cell])
    assert (found.tokens_per_s, found.accuracy) == (10.0, 0.75)
    with pytest.raises(DataError, match="has 4 steps; it takes 5, as in the last of them nothing"):
        read_run(run, arm="async", seed=0, warm_up=1, last=4)


def test_trees_that_arrived_are_told_over_those_that_were_trained(tmp_path):
    made = [record(1), record(2, **{"trees/accepted": 2}), record(3, **{"trees/accepted": 3})]
    (found,) = summarize([read_run(made_run(tmp_path, made), arm="a", seed=0, warm_up=1, last=3)])
    assert found.arrived_per_trained == 5 / 8


def test_a_run_that_was_interrupted_is_not_timed(tmp_path):
    again = record(2, **{"learner/lineage": 1})
    run = made_run(tmp_path, [record(1), record(2), again, record(3, **{"learner/lineage": 1})])
    with pytest.raises(DataError, match="learner/lineage is above 0 from step 2 on"):
        read_run(run, arm="sync", seed=0, warm_up=1, last=3)


def test_a_run_of_which_a_step_is_missing_is_not_timed(tmp_path):
    run = made_run(tmp_path, [record(1), record(3), record(4)])
    with pytest.raises(DataError, match="has not one record for each step"):
        read_run(run, arm="sync", seed=0, warm_up=1, last=3)


def test_ledgers_are_of_the_seconds_that_were_told_and_the_learners_of_its_steps(tmp_path):
    def told(seconds, compute):
        return {
            "ledger/actor/seconds": seconds,
            **{f"ledger/actor/{account}": 0.0 for account in Account},
            "ledger/actor/compute": compute,
            "ledger/actor/wait_data": 1 - compute,
        }

    # the learner tells shares too, of other seconds than those of its steps
    shares = {"ledger/learner/seconds": 2.0, "ledger/learner/compute": 1.0}
    steps = [record(1), record(2, **told(4.0, 0.75), **shares), record(3, **told(16.0, 0.25))]
    cell = read_run(made_run(tmp_path, steps), arm="sync", seed=0, warm_up=1, last=3)
    found = {(row.role, row.account): row.seconds for row in cell.ledger}
    assert (found["actor", "compute"], found["actor", "wait_data"]) == (7.0, 13.0)
    learner = [found["learner", account] for account in Account]
    assert learner == [9.0, 8.0, 0.0, 0.5, 2.0, 0.0, 0.5]
    assert {role for role, _ in found} == {"learner", "actor"}
    (summary,) = summarize([cell])
    assert (summary.actor_idle, summary.learner_idle) == (0.65, 0.45)


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not there"):
        read_run(tmp_path, arm="sync", seed=0, warm_up=1, last=3)
