import time

import pytest

from treepo_async.metrics.record import STEP_NAMES, WEIGHTS_NAMES, Recorder, eval_record


def tree(outcome="accepted", **changes):
    event = {
        "event": "tree",
        "outcome": outcome,
        "actor": "actor-0",
        "num_leaves": 4,
        "accuracy_sum": 3.0,
        "num_scored": 4,
        "decoded_tokens": 60,
        "delivered_tokens": 100,
        "wasted_tokens": 5,
        "cached_tokens": 30,
        "prefix_tokens": 40,
        "num_requests": 10,
        "overhead_s": 0.5,
        "grow_s": 1.0,
        "num_fallbacks": 2,
        "num_pruned": 1,
        "saved_tokens": 7,
        "weight_sum": 2.0,
        "weighted_tokens": 30.0,
        "num_children": 8,
        "num_spilled": 1,
        "num_migrated": 0,
        "moved_tokens": 12,
        "refilled_tokens": 20,
    }
    return {**event, **changes}


def step(**changes):
    numbers = {field: float(i) for i, field in enumerate(STEP_NAMES.values())}
    event = {
        "event": "step",
        "step": 3,
        "policy_step": 4,
        "seconds": {"wait_batch": 2.0, "train": 5.0, "other": 1.0, "wall": 8.0},
        "replay": {"trained": 8, "reason/degenerate": 1},
    }
    return {**event, **numbers, **changes}


WEIGHTS = {"event": "weights", "version": "0.4", "step": 4, "gap": 1e-6, "pause_s": 0.4, "drain_s": 0.1, "load_s": 0.2, "probe_s": 0.1, "publish_to_visible_s": 0.7}  # fmt: skip


def test_a_record_puts_the_roles_numbers_under_their_names():
    recorder = Recorder()
    recorder.tree(tree())
    recorder.tree(
        tree("degenerate", decoded_tokens=40, delivered_tokens=100, accuracy_sum=4.0, grow_s=3.0)
    )
    recorder.engine({"num_samples": 4, "num_idle": 1})
    recorder.engine({"num_samples": 4, "num_idle": 2})
    begin = time.time()
    record = recorder.step(step(), WEIGHTS)
    assert begin <= record.pop("time") <= time.time()
    assert record == {
        "step": 4,
        **{name: float(i) for i, name in enumerate(STEP_NAMES)},
        "gap/probe_max": 1e-6,
        "weights/pause_s": 0.4,
        "weights/drain_s": 0.1,
        "weights/load_s": 0.2,
        "weights/probe_s": 0.1,
        "weights/visible_s": 0.7,
        "tokens/decoded": 100,
        "tokens/delivered": 200,
        "tokens/wasted": 10,
        "tokens/stale": 0,
        "tokens/decoded_per_delivered": 0.5,
        "cache/hit_share": 0.75,
        "engine/http_s": 0.05,
        "accuracy/sampled": 0.875,
        "tokens/saved": 14,
        "length/delivered": 25.0,
        "length/unbiased": 15.0,
        "tree/grow_mean_s": 2.0,
        "tree/grow_max_s": 3.0,
        "route/home_share": 1 - 2 / 16,
        "route/spilled": 2,
        "route/migrated": 0,
        "route/moved_tokens": 24,
        "route/refilled_tokens": 40,
        "route/load_max_mean": None,
        "trees/fallback_runs": 4,
        "trees/pruned_paths": 2,
        "trees/accepted": 1,
        "trees/degenerate": 1,
        "time/wait_batch_s": 2.0,
        "time/train_s": 5.0,
        "time/other_s": 1.0,
        "time/wall_s": 8.0,
        "idle/learner": 0.25,
        "idle/engine": 0.375,
        "leases/trained": 8,
        "leases/reason/degenerate": 1,
    }


def test_what_nothing_is_known_of_is_none():
    record = Recorder().step(step(seconds={"wall": 8.0}), None)
    unknown = {*WEIGHTS_NAMES, "tokens/decoded_per_delivered", "cache/hit_share", "engine/http_s", "accuracy/sampled", "idle/engine", "length/delivered", "length/unbiased", "tree/grow_mean_s", "tree/grow_max_s", "route/home_share", "route/load_max_mean"}  # fmt: skip
    assert {name for name, value in record.items() if value is None} == unknown
    assert record["idle/learner"] == 0
    assert record["tokens/decoded"] == 0


def test_trees_that_came_too_late_are_counted_with_what_they_cost():
    recorder = Recorder()
    for outcome in ("accepted", "stale", "degenerate", "stale"):
        recorder.tree(tree(outcome))
    record = recorder.step(step(), None)
    assert (record["trees/stale"], record["tokens/stale"]) == (2, 120)
    assert record["tokens/decoded"] == 240


def test_each_step_counts_from_nothing():
    recorder = Recorder()
    recorder.tree(tree())
    recorder.engine({"num_samples": 4, "num_idle": 4})
    recorder.step(step(), None)
    record = recorder.step(step(), None)
    assert record["tokens/decoded"] == 0
    assert record["idle/engine"] is None
    assert "trees/accepted" not in record


def test_a_step_event_that_lacks_a_number_is_not_passed_over():
    event = step()
    del event["loss"]
    with pytest.raises(KeyError, match="loss"):
        Recorder().step(event, None)


def test_an_evaluation_is_recorded_at_the_step_of_its_policy_and_pass_at_k_only_where_it_is():
    event = {
        "event": "eval",
        "version": "0.20",
        "step": 20,
        "num_problems": 64,
        "num_samples": 1,
        "sampled_accuracy": 0.5,
        "greedy_accuracy": 0.6,
        "seconds": 1.5,
    }
    record = eval_record(event)
    assert abs(record.pop("time") - time.time()) < 5
    assert record == {
        "step": 20,
        "eval/sampled_accuracy": 0.5,
        "eval/greedy_accuracy": 0.6,
        "eval/seconds": 1.5,
    }
    assert eval_record({**event, "pass_at_k": 0.75})["eval/pass_at_k"] == 0.75


def test_rows_by_lag_and_level_become_flat_names():
    tables = {
        "by_lag": {"0": {"tokens": 5, "ess": 1.0}, "8+": {"tokens": 2, "ess": None}},
        "by_level": {"16+": {"tokens": 7}},
    }
    record = Recorder().step(step(**tables), None)
    found = {name: v for name, v in record.items() if name.startswith(("lag/", "level/"))}
    assert found == {
        "lag/0/tokens": 5,
        "lag/0/ess": 1.0,
        "lag/8+/tokens": 2,
        "lag/8+/ess": None,
        "level/16+/tokens": 7,
    }


def test_the_load_of_engines_is_that_of_the_busiest_over_their_mean_and_begins_anew_each_step():
    recorder = Recorder()
    for engine, tokens in (("a", 100), ("b", 50), ("a", 50), ("c", 0)):
        recorder.route({"engine": engine, "num_requests": 1, "decoded_tokens": tokens})
    assert recorder.step(step(), None)["route/load_max_mean"] == pytest.approx(150 / (200 / 3))
    assert recorder.step(step(), None)["route/load_max_mean"] is None
