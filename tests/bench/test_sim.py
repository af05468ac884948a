import pytest

from tests.bench.runs import step, write_run
from treepo_async.bench import sim
from treepo_async.bench.async_cells import parse as parse_async
from treepo_async.bench.async_rows import Arm
from treepo_async.bench.async_summary import summarize
from treepo_async.bench.sim_arms import measure
from treepo_async.bench.sim_scale import draw, scale_of, table, write
from treepo_async.errors import ConfigError, TreepoError


def test_validation_makes_three_runs_once_and_predicts_two_from_the_first(tmp_path):
    made = []

    def launch(keys, log, timeout_s):
        made.append([key for key in keys if key.startswith("replay.")])
        values = dict(key.split("=") for key in keys)
        folder = write_run(
            sim.Path(values["run_dir"]),
            [step(number) for number in range(1, 13)],
            steps=12,
            staleness=int(values["replay.max_staleness"]),
        )
        (folder / "model").mkdir()
        (folder / "model" / "policy_version").write_text("0.12")
        return 0

    text = sim.validated(tmp_path, launch, lambda line: None)
    assert made == [list(cell.keys) for cell in sim.VALIDATION]
    assert [line.split(" | ")[0] for line in text.splitlines()[-2:]] == ["| synchronous", "| large"]
    assert sim.validated(tmp_path, None, lambda line: None) == text


def test_a_validation_run_that_fails_ends_it_with_its_last_words(tmp_path):
    def launch(keys, log, timeout_s):
        log.write_text("the engine did not start")
        return 1

    with pytest.raises(TreepoError, match=r"ahead failed with 1.*the engine did not start"):
        sim.validated(tmp_path, launch, lambda line: None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate=a"], "go together"),
        (["validate=a", "actors=8"], "without other keys"),
        (["actors=8,12"], "multiples of 8"),
        (["actors=x"], "multiples of 8"),
        (["size=8"], "unknown key size"),
    ],
)
def test_other_words_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        sim.parse(words)


def test_a_single_learner_is_the_limit_of_many_actors_where_one_in_proportion_is_not():
    first = {case: scale_of(case, 8, None, steps=6) for case in ("all", "learner")}
    large = {case: scale_of(case, 64, first[case], steps=6) for case in first}
    assert large["all"].share > 0.8
    assert large["learner"].share < 0.6
    assert large["learner"].learner_busy > 0.75 > 0.5 > large["all"].learner_busy


def test_scaling_is_written_as_table_rows_and_picture(tmp_path):
    scales = [scale_of("all", 8, None, steps=1)]
    assert write(scales, tmp_path) == table(scales)
    assert (tmp_path / "scale.csv").read_text().count("\n") == 2
    draw(tmp_path / "again.png", scales)
    assert (tmp_path / "again.png").read_bytes().startswith(b"\x89PNG")


def test_simulated_arms_have_the_rows_of_the_others_and_their_order():
    options = parse_async(["backend=sim", "steps=24"])
    cells = [measure(options, arm, seed=0) for arm in Arm]
    rates = {s.arm: s.tokens_per_s for s in summarize(cells)}
    assert rates["sync"] < rates["one_step"] < rates["async"] < rates["async_inflight"]
    assert rates["sync"] < rates["sync2"] < rates["async_inflight"]
    for cell in cells:
        assert len(cell.steps) == options.steps - options.warm_up
        assert {row.account for row in cell.ledger if row.role == "engine"} == {
            "compute",
            "idle",
            "sync",
        }
