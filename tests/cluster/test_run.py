"""What a run looks at before it joins a cluster; no Ray runs here."""

import pytest

from treepo_async.cluster.plan import make_plan
from treepo_async.cluster.run import check_files, run
from treepo_async.config.command_line import parse
from treepo_async.errors import ConfigError


@pytest.fixture
def files(tmp_path):
    """A token and a runtime environment that can be used."""
    token, environment = tmp_path / "token", tmp_path / "env.yaml"
    token.touch(mode=0o600)
    environment.write_text("env_vars: {A: b}")
    return token, environment


def config_of(files, *words):
    token, environment = files
    named = [f"cluster.token_file={token}", f"cluster.runtime_env={environment}"]
    return parse(["cluster.ray_address=10.0.0.1:6379", *named, *words])


def test_files_that_are_named_for_a_cluster_are_read(files):
    assert check_files(config_of(files).cluster) == {"env_vars": {"A": "b"}}
    assert check_files(parse([]).cluster) == {}


@pytest.mark.parametrize(
    ("number", "change", "says"),
    [
        (0, lambda file: file.unlink(), r"cluster\.token_file=.*token is no file"),
        (0, lambda file: file.chmod(0o644), "chmod 600"),
        (1, lambda file: file.unlink(), r"cluster\.runtime_env=.*env\.yaml cannot be read"),
        (1, lambda file: file.write_text("[1]"), r"cluster\.runtime_env=.*env\.yaml holds no map"),
    ],
)
def test_a_file_that_cannot_be_used_ends_a_run_before_anything_starts(
    files, tmp_path, number, change, says
):
    config = config_of(files, f"cache_dir={tmp_path / 'cache'}")
    change(files[number])
    plan = make_plan(config, run_dir=tmp_path / "run", model_dir=tmp_path)
    with pytest.raises(ConfigError, match=says):
        run(config, plan, say=print)
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run").exists()
