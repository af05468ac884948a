import json
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors import safe_open

from treepo_async.config.schema import TINY, TINY_PRECEDENCE
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.cache import content_hash, prepare
from treepo_async.tiny.recipe import DEFAULT_ARCHITECTURE, Recipe

RECIPE = Recipe(
    num_steps=3, p_hurried=0.5, p_slip=0.1, batch_size=4, num_demonstrations=16, num_threads=1
)
SHORT = replace(BUILT_INS[TINY], recipe=RECIPE)
PREPARE_SHORT = f"""
import sys
from dataclasses import replace
from pathlib import Path
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.cache import prepare
from treepo_async.tiny.recipe import Recipe
short = replace(BUILT_INS["tiny"], recipe={RECIPE!r})
print(prepare(Path(sys.argv[1]), 0, built_in=short))
"""


def weights(folder):
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("cache"), 0, built_in=SHORT)


def test_the_folder_is_complete_and_nothing_else_is_left_behind(folder):
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    summary = json.loads((folder / "warm_start.json").read_text())
    assert summary["recipe"]["num_steps"] == 3
    assert 0 < summary["final_loss"] < 10
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0


def test_a_second_call_uses_the_folder_and_trains_nothing(folder):
    steps = []
    again = prepare(folder.parent, 0, lambda *step: steps.append(step), SHORT)
    assert again == folder
    assert steps == []


def test_every_step_is_reported(tmp_path):
    steps = []
    prepare(tmp_path / "new" / "cache", 0, lambda *step: steps.append(step), SHORT)
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(4 < loss < 8 for _, _, loss in steps)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(folder, tmp_path):
    same, other = (prepare(tmp_path, seed, built_in=SHORT) for seed in (0, 1))
    assert same.name == folder.name
    assert weights(same) == weights(folder)
    assert weights(other) != weights(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"built_in": replace(SHORT, recipe=replace(RECIPE, p_slip=0.5))},
        {"built_in": SHORT, "architecture": replace(DEFAULT_ARCHITECTURE, num_layers=4)},
        {"built_in": replace(SHORT, task=BUILT_INS[TINY_PRECEDENCE].task)},
    ],
    ids=["recipe", "architecture", "task"],
)
def test_whatever_decides_the_weights_decides_the_name(folder, changed):
    assert prepare(folder.parent, 0, **changed) != folder


def test_the_folder_is_named_after_the_task(tmp_path):
    precedence = replace(BUILT_INS[TINY_PRECEDENCE], recipe=RECIPE)
    assert prepare(tmp_path, 0, built_in=precedence).name == (
        f"tiny-precedence-{content_hash(precedence, DEFAULT_ARCHITECTURE, 0)}"
    )


def test_models_cached_by_earlier_versions_are_found():
    assert content_hash(BUILT_INS[TINY_PRECEDENCE], DEFAULT_ARCHITECTURE, 0) == "3d612e1d134b4f23"


def test_a_failing_build_leaves_nothing_behind(tmp_path):
    def stop(step, num_steps, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, 0, stop, SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_half_built_folder_is_replaced(folder, tmp_path):
    broken = tmp_path / folder.name
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert prepare(tmp_path, 0, built_in=SHORT) == broken
    assert weights(broken) == weights(folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.slow
def test_two_processes_preparing_at_once_end_with_one_good_folder(folder, tmp_path):
    command = [sys.executable, "-c", PREPARE_SHORT, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        printed = {process.communicate(timeout=50)[0].strip() for process in processes}
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert printed == {str(tmp_path / folder.name)}
    assert weights(tmp_path / folder.name) == weights(folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_the_loser_of_the_race_uses_the_winners_folder(folder, tmp_path):
    def overtake(step, num_steps, loss):
        if step == num_steps:
            prepare(tmp_path, 0, built_in=SHORT)

    assert weights(prepare(tmp_path, 0, overtake, SHORT)) == weights(folder)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
