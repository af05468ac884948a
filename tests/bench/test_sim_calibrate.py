from dataclasses import replace

import pytest

from tests.bench.runs import evaluation, step, write_run
from treepo_async.bench.sim_calibrate import (
    calibrate,
    predict,
    scaled_engine,
    step_s,
    table,
    with_rules,
)
from treepo_async.bench.sim_run import lengths_of, read_real_run
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


def test_lengths_have_the_tokens_that_each_level_had():
    lengths = lengths_of([{"level/0/tokens": 80, "level/1/tokens": 60, "level/2/tokens": 20}], 10)
    per_response = sum(lengths.lengths) / len(lengths.lengths)
    assert per_response == pytest.approx(160 / 8, rel=0.02)
    # of eight responses all reach the first level's middle, six the second's, two the third's
    assert sum(length >= 15 for length in lengths.lengths) / 1000 == pytest.approx(6 / 8, abs=0.03)


def test_a_calibrated_simulation_has_the_step_time_of_its_run(run):
    settings = calibrate(run)
    assert step_s(settings) == pytest.approx(run.step_s, rel=0.01)
    assert settings.learner.token_s * run.tokens == pytest.approx(run.train_s)
    assert settings.weights == WeightsSpeed(publish_s=run.publish_s, load_s=run.load_s)


def test_a_simulated_run_that_is_read_as_a_real_one_is_predicted_from_another(run):
    # the truth: an engine of 1.7 times the usual times
    truth = with_rules(
        SimSettings(
            lengths=run.lengths,
            degenerate=run.degenerate,
            learner=LearnerSpeed(0.0, run.train_s / run.tokens),
            weights=WeightsSpeed(publish_s=run.publish_s, load_s=run.load_s),
        ),
        run,
    )
    truth = replace(truth, engine=scaled_engine(truth.engine, 1.7))
    seen = replace(run, step_s=step_s(truth))
    other = replace(run, name="ahead", max_staleness=3, prompts_per_batch=6)
    other = replace(other, step_s=step_s(with_rules(truth, other)))
    settings = calibrate(seen)
    prediction = predict(settings, other)
    assert abs(prediction.error) < 0.02
    assert "| ahead |" in table(seen, settings, [prediction])


def test_a_run_that_drops_more_trees_is_predicted_slower_with_its_own_share(run):
    prediction = predict(calibrate(run), replace(run, degenerate=0.6))
    assert prediction.simulated_s == pytest.approx(run.step_s, rel=0.01)
    assert prediction.informed_s > 1.3 * prediction.simulated_s


def test_a_run_whose_learner_is_the_limit_calibrates_no_engine(run):
    with pytest.raises(DataError, match="is the learner the limit"):
        calibrate(replace(run, step_s=0.4))
