import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from treepo_async.cluster.plan import make_plan
from treepo_async.cluster.ray_cluster import RayCluster, check_token_file, ray_cluster
from treepo_async.cluster.role import RoleHost
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError

SOON_S = 60.0


def family():
    return psutil.Process().children(recursive=True)


def temporary_folders():
    """Those that processes of this test were told of."""
    words = " ".join(word for process in family() for word in process.cmdline())
    return {Path(folder) for folder in re.findall(r"/tmp/treepo-[0-9a-f]{6}", words)}


@pytest.fixture
def variables():
    """The environment is after the test as it was before."""
    saved = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(saved)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.usefixtures("variables")
def test_a_cluster_runs_a_role_and_leaves_nothing_behind(tmp_path):
    plan = make_plan(Config(), run_dir=tmp_path / "no-run", model_dir=tmp_path)
    spec, before = plan.roles[-1], {process.pid for process in family()}
    with ray_cluster(None, cache_dir=tmp_path / "cache", num_cpus=1) as cluster:
        (temporary,) = temporary_folders()
        assert temporary.exists()
        host = cluster.ray.remote(num_cpus=0)(RoleHost).remote(spec, tmp_path / "actor.log")
        cluster.ray.get(host.start.remote(), timeout=SOON_S)
        cluster.record()
        deadline = time.monotonic() + SOON_S
        while (report := cluster.ray.get(host.report.remote(), timeout=SOON_S)).exit_code is None:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert report.exit_code == 1
        assert "no-run/config.yaml" in report.tail
        assert (tmp_path / "cache" / "ray_token").stat().st_mode & 0o777 == 0o600
    assert not temporary.exists()
    assert {process.pid for process in family()} <= before
    assert list((tmp_path / "cache" / "running").iterdir()) == []


class RayError(Exception):
    """What Ray raises."""


@pytest.fixture
def fake_ray(monkeypatch, variables):
    """A Ray that nothing is started of, in the place of the real one: `inits` has what it was told, `fails` what it raises."""
    names = (
        "ray",
        "ray.exceptions",
        "ray.runtime_env",
        "ray.util",
        "ray.util.scheduling_strategies",
    )
    found = {name: ModuleType(name) for name in names}
    ray = found["ray"]
    ray.inits, ray.fails = [], None

    def init(**options):
        ray.inits.append(options)
        if ray.fails is not None:
            raise ray.fails

    def runtime_env(**env):
        if not isinstance(env.get("pip", []), list):
            raise TypeError("runtime_env['pip'] must be of type str or List[str]")

    ray.init, ray.shutdown = init, lambda: None
    found["ray.exceptions"].RayError, found["ray.runtime_env"].RuntimeEnv = RayError, runtime_env
    ray.util = found["ray.util"]
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return ray


def joined(tmp_path, **runtime_env):
    there = {"num_cpus": 1, "runtime_env": runtime_env}
    with ray_cluster("10.0.0.1:6379", cache_dir=tmp_path / "cache", **there):
        pass


def test_the_environment_of_the_roles_is_that_of_the_job_for_which_ray_brings_folders(
    fake_ray, tmp_path
):
    joined(tmp_path, working_dir=str(tmp_path))
    (options,) = fake_ray.inits
    assert options["runtime_env"] == {"working_dir": str(tmp_path)}
    with pytest.raises(ConfigError, match=r"cluster\.runtime_env is not what Ray takes: .*'pip'"):
        joined(tmp_path, pip=3)
    assert len(fake_ray.inits) == 1, "nothing was joined"


def test_a_token_that_the_cluster_does_not_take_is_told_by_its_key(fake_ray, tmp_path):
    fake_ray.fails = RayError("token mismatch\nmore")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:6379 cannot be joined: RayError: token mismatch \(cluster\.token"):  # fmt: skip
        joined(tmp_path)


def test_pids_that_cannot_be_written_down_end_no_run(tmp_path):
    cluster = RayCluster(None, tmp_path / "gone" / "1.json", reaper_pid=0)
    cluster.record()
    (tmp_path / "gone").mkdir()
    again = RayCluster(None, cluster.record_file, reaper_pid=0)
    again.record()
    assert cluster.record_file.is_file()


def test_a_token_that_others_can_read_is_refused_and_so_is_none(tmp_path):
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"cluster\.token_file=.*token is no file"):
        check_token_file(str(file))
    file.touch(mode=0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_token_file(str(file))
    file.chmod(0o600)
    assert check_token_file(str(file)) == file
