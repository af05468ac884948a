from dataclasses import replace

import pytest

from tests.bench.runs import evaluation, step, write_run
from treepo_async.bench.sim_calibrate import (
    calibrate,
    drops,
    means,
    predict,
    scaled_engine,
    table,
    with_rules,
)
from treepo_async.bench.sim_drops import GAMMA
from treepo_async.bench.sim_run import dropped_size, drops_of, lengths_of, read_real_run
from treepo_async.bench.sim_settings import LearnerSpeed, SimSettings, WeightsSpeed
from treepo_async.errors import DataError

RECORDS = [step(number) for number in range(1, 13)]


@pytest.fixture
def run(tmp_path):
    return read_real_run(write_run(tmp_path / "run", RECORDS, steps=12, staleness=0))


def test_a_run_is_read_with_its_size_and_its_times(run):
    assert (run.actors, run.trees_per_actor, run.prompts_per_batch, run.max_running) == (
        2,
        4,
        3,
        16,
    )
    assert (run.step_s, run.train_s, run.publish_s, run.load_s) == pytest.approx(
        (2, 0.5, 0.1, 0.05)
    )
    assert (run.degenerate, run.tokens, run.num_steady) == (0.25, 100, 8)


def test_steps_that_an_evaluation_delayed_and_the_first_ones_do_not_count(tmp_path):
    slow = [
        step(n, **{"time/wall_s": 50.0}) if n in (1, 7) else r for n, r in enumerate(RECORDS, 1)
    ]
    folder = write_run(tmp_path / "run", [*slow, evaluation(6, 0.5)], steps=12)
    run = read_real_run(folder)
    assert (run.step_s, run.num_steady) == (2.0, 7)


def test_a_run_with_too_few_steady_steps_is_named(tmp_path):
    with pytest.raises(DataError, match="at least 6 are needed"):
        read_real_run(write_run(tmp_path / "run", RECORDS[:9]))
    with pytest.raises(DataError, match="no folder of a run"):
        read_real_run(tmp_path / "nowhere")


def test_a_run_that_was_interrupted_is_refused(tmp_path):
    again = [step(n, **{"learner/lineage": int(n > 9)}) for n in range(1, 13)]
    with pytest.raises(DataError, match="learner/lineage=1, the run was interrupted"):
        read_real_run(write_run(tmp_path / "run", again))


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_run_that_computes_prefixes_again_is_refused_by_name(tmp_path, mode):
    engine = {"update_mode": mode, "max_running_requests": 16}
    with pytest.raises(DataError, match=rf"engine\.update_mode={mode} is not modelled"):
        read_real_run(write_run(tmp_path / "run", RECORDS, engine=engine))


def test_a_run_is_read_with_its_rules_for_dropped_trees_and_what_became_of_them(tmp_path):
    replay = {
        "prompts_per_batch": 3,
        "max_staleness": 1,
        "drop_degenerate": False,
        "max_refills": 7,
    }
    records = [*RECORDS[:4], step(5, **{"trees/degenerate": 0, "trees/accepted": 0}), *RECORDS[5:]]
    run = read_real_run(write_run(tmp_path / "run", records, replay=replay))
    settings = with_rules(SimSettings(), run)
    assert (settings.drop_degenerate, settings.max_refills) == (False, 7)
    # of the warm-up too, and not of a step in which nothing arrived
    assert run.drops == tuple((n, 1, 3, 0.5) for n in range(1, 13) if n != 5)


@pytest.mark.parametrize("missing", [{}, {"staleness/mean": None}])
def test_trees_of_a_record_without_staleness_are_of_its_own_step(missing):
    record = {key: value for key, value in step(3).items() if key != "staleness/mean"}
    assert drops_of([record | missing]) == ((3, 1, 3, 0.0),)


def test_the_size_of_dropped_trees_is_what_was_decoded_and_not_trained():
    counts = {"trees/degenerate": 2, "trees/accepted": 4}
    records = [step(n, **counts, **{"tokens/unique": 400, "tokens/decoded": 560}) for n in (1, 2)]
    assert dropped_size(records) == pytest.approx(80 / 100)
    assert dropped_size([step(1, **{"trees/degenerate": 0})]) == 1.0


def test_lengths_have_the_tokens_that_each_level_had():
    lengths = lengths_of([{"level/0/tokens": 80, "level/1/tokens": 60, "level/2/tokens": 20}], 10)
    per_response = sum(lengths.lengths) / len(lengths.lengths)
    assert per_response == pytest.approx(160 / 8, rel=0.02)
    # of eight responses all reach the first level's middle, six the second's, two the third's
    assert sum(length >= 15 for length in lengths.lengths) / 1000 == pytest.approx(6 / 8, abs=0.03)


def test_a_calibrated_simulation_has_the_step_time_of_its_run(run):
    settings = calibrate(run)
    assert means(settings).step_s == pytest.approx(run.step_s, rel=0.01)
    assert (settings.degenerate, settings.dropped_size) == (drops(run), run.dropped_size)
    assert settings.learner.token_s * run.tokens == pytest.approx(run.train_s)
    assert settings.weights == WeightsSpeed(publish_s=run.publish_s, load_s=run.load_s)


def test_a_simulated_run_that_is_read_as_a_real_one_is_predicted_from_another(run):
    # the truth: an engine of 1.7 times the usual times
    truth = with_rules(
        SimSettings(
            lengths=run.lengths,
            degenerate=drops(run),
            dropped_size=run.dropped_size,
            learner=LearnerSpeed(0.0, run.train_s / run.tokens),
            weights=WeightsSpeed(publish_s=run.publish_s, load_s=run.load_s),
        ),
        run,
    )
    truth = replace(truth, engine=scaled_engine(truth.engine, 1.7))
    seen = replace(run, step_s=means(truth).step_s)
    other = replace(run, name="ahead", max_staleness=3, prompts_per_batch=6)
    other = replace(other, step_s=means(with_rules(truth, other)).step_s)
    settings = calibrate(seen)
    prediction = predict(settings, other)
    assert abs(prediction.error) < 0.02
    text = table(seen, settings, [prediction])
    assert "| ahead |" in text
    # 12 steps of twice the batch are 15.8 of the run's own
    assert prediction.reach == pytest.approx(2**GAMMA)
    assert "ahead learns as much as 1.32 times the steps of run teach" in text
    assert "guessed" not in table(seen, settings, [replace(prediction, reach=1.3)])


def test_a_run_that_drops_more_trees_is_predicted_slower_with_its_own_share(run):
    many = tuple((step, 6, 4, 0.5) for step in range(1, 13))
    settings = calibrate(run)
    prediction = predict(settings, replace(run, degenerate=0.6, drops=many))
    assert prediction.simulated.step_s == pytest.approx(run.step_s, rel=0.01)
    assert prediction.simulated.degenerate == pytest.approx(0.25, abs=0.08)
    assert prediction.informed.degenerate == pytest.approx(0.6, abs=0.08)
    assert prediction.informed.step_s > 1.3 * prediction.simulated.step_s
    row = table(run, settings, [prediction]).splitlines()[-1].split(" | ")
    assert row[4] == "60 %"
    assert row[5] == f"{100 * prediction.simulated.degenerate:.0f} %"


def test_what_a_run_drops_is_not_predicted_from_one_that_drops_nothing(run):
    kept = with_rules(SimSettings(), replace(run, drop_degenerate=False))
    with pytest.raises(DataError, match=r"replay\.drop_degenerate=true.*calibrate on a run"):
        predict(kept, run)


def test_a_run_without_counts_of_trees_calibrates_nothing(run):
    with pytest.raises(DataError, match="no trees/accepted"):
        calibrate(replace(run, drops=()))


def test_a_run_whose_learner_is_the_limit_calibrates_no_engine(run):
    with pytest.raises(DataError, match="is the learner the limit"):
        calibrate(replace(run, step_s=0.4))
