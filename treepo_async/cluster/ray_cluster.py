"""A Ray cluster for one run: the one at an address, or a local one that ends with the run."""

import contextlib
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_async.cluster import reaper
from treepo_async.errors import ConfigError
from treepo_async.process import kill_recorded, record_family

RECORD_S = 5.0
OBJECT_STORE_BYTES = 80 * 2**20
"""Nothing of ours goes through Ray's object store; this is the least it takes."""

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class RayCluster:
    """A connected cluster; call `record()` often while processes come and go."""

    ray: Any
    record_file: Path
    reaper_pid: int
    _next_record: float = 0.0

    def record(self) -> None:
        """Write down the pids of the run, now and then, for whoever must clean up after a killed driver.

        Where that cannot be written, as on a full disk, the last record stays until it can.
        """
        if time.monotonic() < self._next_record:
            return
        self._next_record = time.monotonic() + RECORD_S
        with contextlib.suppress(OSError):
            record_family(self.record_file, os.getpid(), without=self.reaper_pid)


@contextlib.contextmanager
def ray_cluster(
    address: str | None,
    *,
    cache_dir: Path,
    num_cpus: int,
    token_file: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
) -> Iterator[RayCluster]:
    """Connect, and leave nothing behind.

    Args:
        address: of an existing cluster; None starts one.
        cache_dir: holds Ray's token and the records of runs.
        num_cpus: of a cluster that is started: a label, which Ray counts against.
        token_file: of the existing cluster.
        runtime_env: of all that is started on the existing cluster; Ray brings local folders that it names to the nodes.

    Raises:
        ConfigError: there is no such cluster, it does not take the token, or Ray cannot bring a folder there.
    """
    records = cache_dir / "running"
    records.mkdir(parents=True, exist_ok=True)
    reap_killed_runs(records)
    record = record_file(records, os.getpid())
    # short, because the paths of Ray's sockets may have 107 bytes at most
    temporary = Path("/tmp") / f"treepo-{secrets.token_hex(3)}"
    _keep_files_here(temporary, cache_dir)
    make_importable()
    watcher = reaper.start(record, temporary)
    try:
        if address is None:
            ray = _start(cache_dir=cache_dir, temporary=temporary, num_cpus=num_cpus)
        else:
            ray = _connect(address, token_file, runtime_env or {})
        try:
            yield RayCluster(ray, record, watcher.pid)
        finally:
            ray.shutdown()
    finally:
        kill_recorded(record)
        if watcher.stdin is not None:
            watcher.stdin.close()
        watcher.wait(timeout=30)


def record_file(records: Path, pid: int) -> Path:
    """Where a driver of this machine keeps the pids of its run; the folder may be that of several machines."""
    return records / f"{_machine()}.{pid}.json"


def reap_killed_runs(records: Path) -> int:
    """End processes of runs of this machine whose driver is gone. Gives their number."""
    own = [file for file in records.glob("*.json") if file.stem.rpartition(".")[0] == _machine()]
    dead = [f for f in own if not Path("/proc", f.stem.rpartition(".")[2]).exists()]
    return sum(kill_recorded(file) for file in dead)


def _machine() -> str:
    """Its name and its kernel's: containers of one machine have the second alone in common, and copies of one image the first."""
    boot = BOOT_ID.read_text().strip() if BOOT_ID.exists() else ""
    return f"{socket.gethostname()}.{boot[:8]}"


def _keep_files_here(temporary: Path, cache_dir: Path) -> None:
    """Have the processes of the run write nowhere else: temporary files go with Ray's, caches into ours."""
    temporary.mkdir(mode=0o700)
    os.environ["TMPDIR"] = str(temporary)
    os.environ.setdefault("SGLANG_CACHE_DIR", str(cache_dir.resolve() / "sglang"))


def make_importable() -> None:
    """Let processes that this one starts import this package wherever the driver was started."""
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )


def _start(*, cache_dir: Path, temporary: Path, num_cpus: int) -> Any:
    """A cluster on this machine."""
    # a worker that asked for no GPU sees what this process sees; roles that share GPUs name theirs among these
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's workers run at nice 15 by default, and an engine below them would too
    os.environ.setdefault("RAY_worker_niceness", "0")
    # before the import: Ray reads both when it is loaded
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(_token_file(cache_dir)))
    return _init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=str(temporary),
    )


def _connect(address: str, token_file: str | None, runtime_env: Mapping[str, Any]) -> Any:
    """The cluster at an address. The runtime environment is that of the job: Ray brings no local folder for an actor alone.

    Raises:
        ConfigError: see `ray_cluster`.
    """
    if token_file is not None:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(check_token_file(token_file))
    # not before the token is named: Ray reads its variables when it is loaded
    from ray.exceptions import RayError
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**runtime_env)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cluster.runtime_env is not what Ray takes: {error}") from error
    try:
        return _init(address=address, runtime_env=dict(runtime_env))
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        token = token_file or "not set; a cluster with RAY_AUTH_MODE=token needs it"
        raise ConfigError(
            f"cluster.ray_address={address} cannot be joined: {type(error).__name__}: {first_line} "
            f"(cluster.token_file={token}); look with: ray status --address={address}"
        ) from error


def _init(**options: Any) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.util.scheduling_strategies  # named by `hosts`

    ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    return ray


def check_token_file(file: str) -> Path:
    """The file of a cluster's token.

    Raises:
        ConfigError: it is missing, or open to other users.
    """
    path = Path(file).resolve()
    if not path.is_file():
        raise ConfigError(f"cluster.token_file={file} is no file; ray get-auth-token makes one")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"cluster.token_file={file} is open to other users; run: chmod 600 {file}"
        )
    return path


def _token_file(cache_dir: Path) -> Path:
    """The secret that processes of a local Ray cluster share, made once and readable by its owner only."""
    file = cache_dir.resolve() / "ray_token"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32))
    return file
