"""Who is in a run's folder: one driver at a time, and whoever removes what a run left there."""

import contextlib
import fcntl
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from treepo_async.errors import ConfigError

LOCK_FILE = ".lock"
"""In a run's folder: held by its driver. It is never removed: whoever made another could not see that this one is held."""


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Keep every other driver out of a run's folder; its lock file names this process and its command.

    Raises:
        ConfigError: another one is in it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(
                f"run_dir={run_dir} is in use by another driver ({lock.read() or 'just starting'}); wait for its "
                "end, or name another folder"
            ) from error
        lock.truncate(0)
        lock.write(f"pid {os.getpid()}: {shlex.join([*sys.orig_argv])}")
        lock.flush()
        yield
