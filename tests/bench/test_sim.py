import json
import shutil

import pytest

from tests.bench.runs import step, write_run
from treepo_async.bench import sim
from treepo_async.bench.async_cells import parse as parse_async
from treepo_async.bench.async_rows import Arm
from treepo_async.bench.async_summary import summarize
from treepo_async.bench.sim_arms import measure
from treepo_async.bench.sim_scale import draw, scale_of, table, write
from treepo_async.config.run_lock import LOCK_FILE, held
from treepo_async.errors import ConfigError, TreepoError


class Launcher:
    """Makes runs that were never made."""

    def __init__(self):
        self.made = []

    def __call__(self, keys, log, timeout_s):
        self.made.append(keys)
        values = dict(key.split("=") for key in keys)
        folder = sim.Path(values["run_dir"])
        left = {path.name for path in folder.iterdir()} if folder.exists() else set()
        assert left <= {LOCK_FILE}, "it begins in an empty folder"
        write_run(
            folder,
            [step(number) for number in range(1, 13)],
            steps=12,
            staleness=int(values["replay.max_staleness"]),
        )
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "policy_version").write_text("0.12")
        return 0


def silent(line):
    pass


def stop(folder, label):
    """Note a run as one that was not waited for to its end."""
    file = folder / f"{label}.cell.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"code": -1}))


def test_validation_makes_three_runs_of_a_seed_once_and_predicts_two_from_the_first(tmp_path):
    launch = Launcher()
    text = sim.validated(tmp_path, 3, launch, silent)
    for cell, keys in zip(sim.VALIDATION, launch.made, strict=True):
        assert {*cell.keys, "seed=3"} < set(keys)
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == ["| synchronous", "| large"]
    assert sim.validated(tmp_path, 3, None, silent) == text


def test_a_validation_run_that_was_stopped_is_made_again_from_its_beginning(tmp_path):
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    # one was stopped on its way, one before it was noted that it ended well
    stop(tmp_path, "ahead")
    shutil.rmtree(tmp_path / "ahead" / "model")
    stop(tmp_path, "large")
    launch = Launcher()
    sim.make_runs(tmp_path, 0, launch, silent)
    assert [dict(key.split("=") for key in keys)["run_dir"] for keys in launch.made] == [
        str(tmp_path / "ahead"),
        str(tmp_path / "large"),
    ]


def test_a_finished_run_of_another_seed_is_neither_taken_nor_removed(tmp_path):
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    with pytest.raises(ConfigError, match="holds a run with"):
        sim.make_runs(tmp_path, 3, Launcher(), silent)
    assert (tmp_path / "ahead" / "model" / "policy_version").is_file()


def test_a_run_of_another_seed_that_was_stopped_is_not_removed(tmp_path):
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    stop(tmp_path, "ahead")
    with pytest.raises(ConfigError, match="holds a run with"):
        sim.make_runs(tmp_path, 3, Launcher(), silent)
    assert (tmp_path / "ahead" / "metrics.jsonl").is_file()


def test_a_run_that_is_at_work_is_not_removed(tmp_path):
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    stop(tmp_path, "ahead")
    with held(tmp_path / "ahead"), pytest.raises(ConfigError, match="in use by another driver"):
        sim.make_runs(tmp_path, 0, Launcher(), silent)
    assert (tmp_path / "ahead" / "metrics.jsonl").is_file()


def test_the_lock_of_a_run_stays_while_what_it_left_is_removed(tmp_path):
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    with held(tmp_path / "ahead"):
        lock = (tmp_path / "ahead" / LOCK_FILE).stat().st_ino
    stop(tmp_path, "ahead")
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    assert (tmp_path / "ahead" / LOCK_FILE).stat().st_ino == lock


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_whose_keys_nobody_noted_is_neither_taken_nor_removed(tmp_path, is_finished):
    sim.make_runs(tmp_path, 0, Launcher(), silent)
    (tmp_path / "ahead.cell.json").unlink()
    if not is_finished:
        shutil.rmtree(tmp_path / "ahead" / "model")
    with pytest.raises(ConfigError, match=r"ahead\.cell\.json .* is not there; put that back"):
        sim.make_runs(tmp_path, 0, Launcher(), silent)
    assert (tmp_path / "ahead" / "metrics.jsonl").is_file()


def test_a_validation_run_that_fails_ends_it_with_its_last_words(tmp_path):
    def launch(keys, log, timeout_s):
        log.write_text("the engine did not start")
        return 1

    with pytest.raises(TreepoError, match=r"ahead failed with 1.*the engine did not start"):
        sim.validated(tmp_path, 0, launch, silent)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate=a"], "go together"),
        (["validate=a", "actors=8"], "seed=N alone"),
        (["seed=3"], "goes with validate=DIR alone"),
        (["validate=a", "seed=x"], "seed=x is not a whole number"),
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
        # accounts are of the same time as the steps
        learner_s = sum(row.seconds for row in cell.ledger if row.role == "learner")
        assert learner_s == pytest.approx(cell.steps[-1].seconds)
        # nor is the end in it, when what was laid in before is trained
        arrived = sum(step.arrived_trees for step in cell.steps)
        assert arrived >= 0.97 * sum(step.trained_trees for step in cell.steps)
        engine = {row.account for row in cell.ledger if row.role == "engine"}
        assert {"compute", "sync"} <= engine <= {"compute", "sync", "idle"}
