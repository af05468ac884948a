import json
from pathlib import Path

import pytest

from treepo_async.cluster.runtime_env import load_runtime_env, runtime_env_of
from treepo_async.errors import ConfigError

ROOT = Path("/src")


def test_without_a_file_roles_get_the_path_of_this_source_and_the_drivers_variables():
    assert load_runtime_env(None) == {}
    assert runtime_env_of({}, {"A": "1"}, root=ROOT) == {
        "env_vars": {"A": "1", "PYTHONPATH": "/src"}
    }


def test_what_a_person_wrote_stays_and_its_path_comes_behind_this_source():
    written = {"env_vars": {"PYTHONPATH": "/theirs", "NCCL_DEBUG": "INFO", "N": 3}, "pip": ["x"]}
    found = runtime_env_of(written, {}, root=ROOT)
    assert found["pip"] == ["x"]
    assert found["env_vars"] == {"PYTHONPATH": "/src:/theirs", "NCCL_DEBUG": "INFO", "N": "3"}


@pytest.mark.parametrize("more", [{}, {"working_dir": "s3://code.zip"}])
def test_a_variable_that_a_person_wrote_wins_over_that_of_the_driver(more):
    found = runtime_env_of({"env_vars": {"A": "theirs"}, **more}, {"A": "1", "B": "2"}, root=ROOT)
    assert (found["env_vars"]["A"], found["env_vars"]["B"]) == ("theirs", "2")


@pytest.mark.parametrize("key", ["working_dir", "py_modules"])
def test_where_ray_brings_the_source_the_path_is_left_to_it(key):
    found = runtime_env_of({key: "s3://code.zip"}, {}, root=ROOT)
    assert found == {key: "s3://code.zip", "env_vars": {}}


@pytest.mark.parametrize(
    ("name", "text"),
    [("env.yaml", "env_vars:\n  A: b\n"), ("env.json", json.dumps({"env_vars": {"A": "b"}}))],
)
def test_a_file_may_be_yaml_or_json(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text)
    assert load_runtime_env(str(file)) == {"env_vars": {"A": "b"}}


@pytest.mark.parametrize("text", ["[1]", "env_vars: 3", "a: b: c"])
def test_another_file_is_refused_by_its_name(tmp_path, text):
    file = tmp_path / "env.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"cluster\.runtime_env=.*env\.yaml"):
        load_runtime_env(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_runtime_env(str(tmp_path / "none.yaml"))
