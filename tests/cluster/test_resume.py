import shutil

import numpy as np
import pytest

from treepo_async.cluster.resume import (
    clear_for_resume,
    find_resume_version,
    parse_resumed,
    take_lineage,
)
from treepo_async.config.command_line import parse, to_yaml
from treepo_async.config.wiring import CONFIG_FILE, POLICY_FILE
from treepo_async.errors import ConfigError
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import CheckpointStore, TrainingState
from treepo_async.weights.manifest import TensorInfo
from treepo_async.weights.store import NamedTensor


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a run that was started with `steps=20 actors=3`."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(to_yaml(parse(["steps=20", "actors=3", f"run_dir={folder}"])))
    return folder


def save_checkpoint(run_dir, version):
    store = CheckpointStore(run_dir / "checkpoints", keep=5)
    tensor = NamedTensor("w", TensorInfo("F32", (2,)), np.ones(2, np.float32).tobytes())
    return store.save(TrainingState(version, 1, "tp1", "", []), [("weights", [tensor])])


def damage(checkpoint):
    (checkpoint / "weights.safetensors").write_bytes(b"")


def test_a_run_is_gone_on_with_as_it_was_configured(run_dir):
    config = parse_resumed([f"run_dir={run_dir}"])
    assert (config.steps, config.actors) == (20, 3)


def test_what_does_not_change_its_place_in_the_data_may_be_changed(run_dir):
    words = ["steps=40", "actors=8", "learner=tp4pp2", "learner.lr=1e-4", "replay.max_staleness=4"]
    words += ["data.epochs=2"]
    config = parse_resumed([f"run_dir={run_dir}", *words])
    assert (config.steps, config.actors, config.learner.layout) == (40, 8, "tp4pp2")


@pytest.mark.parametrize("word", ["seed=3", "data=other.jsonl", "replay.prompts_per_batch=8"])
def test_what_decides_its_place_in_the_data_may_not_be_changed(run_dir, word):
    key, _, value = word.replace("data=", "data.path=").partition("=")
    with pytest.raises(
        ConfigError, match=rf"cannot be gone on with otherwise: .*{key}={value} was"
    ):
        parse_resumed([f"run_dir={run_dir}", word])


def test_a_folder_without_a_run_is_a_new_one(tmp_path):
    words = [f"run_dir={tmp_path / 'new'}", "steps=3"]
    assert parse_resumed(words) == parse(words)
    assert parse_resumed(["steps=3"]) == parse(["steps=3"])


def test_resume_false_refuses_a_folder_that_holds_a_run(run_dir):
    with pytest.raises(ConfigError, match="holds a run already, and resume=false; name another"):
        parse_resumed([f"run_dir={run_dir}", "resume=false"])


def test_a_run_goes_on_at_its_newest_whole_checkpoint(run_dir):
    assert find_resume_version(run_dir, 20) is None
    save_checkpoint(run_dir, "0.5")
    newest = save_checkpoint(run_dir, "1.10")
    assert find_resume_version(run_dir, 20) == PolicyVersion(1, 10)
    damage(newest)
    assert find_resume_version(run_dir, 20) == PolicyVersion(0, 5)


def test_checkpoints_that_are_all_damaged_are_told_of_rather_than_begun_anew(run_dir):
    damage(save_checkpoint(run_dir, "0.5"))
    with pytest.raises(ConfigError, match=r"no checkpoint is whole: .*weights\.safetensors"):
        find_resume_version(run_dir, 20)


def leave_model(run_dir, version):
    (run_dir / "model").mkdir()
    (run_dir / "model" / POLICY_FILE).write_text(f"{version}\n")


def test_a_run_that_was_killed_before_it_left_its_model_is_gone_on_with_to_leave_it(run_dir):
    save_checkpoint(run_dir, "0.20")
    assert find_resume_version(run_dir, 20) == PolicyVersion(0, 20)
    leave_model(run_dir, "0.10")
    assert find_resume_version(run_dir, 20) == PolicyVersion(0, 20)


def test_a_run_that_has_all_its_steps_says_how_to_get_more(run_dir):
    save_checkpoint(run_dir, "0.20")
    leave_model(run_dir, "0.20")
    with pytest.raises(ConfigError, match=r"has done its 20 steps; give steps=N for more"):
        find_resume_version(run_dir, 20)
    assert find_resume_version(run_dir, 21) == PolicyVersion(0, 20)


def leave_behind(run_dir):
    for name in ("weights", "replay", "checkpoints"):
        (run_dir / name).mkdir(exist_ok=True)
        (run_dir / name / "file").touch()


def test_a_resumed_run_keeps_its_place_in_the_data_and_publishes_anew(run_dir):
    leave_behind(run_dir)
    clear_for_resume(run_dir)
    assert {path.name for path in run_dir.iterdir()} == {"replay", "checkpoints", CONFIG_FILE}


def test_a_run_that_had_made_no_checkpoint_keeps_its_trees(run_dir):
    leave_behind(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    clear_for_resume(run_dir)
    assert {path.name for path in run_dir.iterdir()} == {"replay", CONFIG_FILE}


def test_a_new_run_has_lineage_0_and_each_start_a_higher_one_whatever_was_used_or_removed(tmp_path):
    assert take_lineage(tmp_path) == 0
    assert take_lineage(tmp_path) == 1
    save_checkpoint(tmp_path, "3.10")
    assert take_lineage(tmp_path) == 4
    (tmp_path / "weights" / "7.12").mkdir(parents=True)
    assert take_lineage(tmp_path) == 8
    clear_for_resume(tmp_path)
    assert take_lineage(tmp_path) == 9
