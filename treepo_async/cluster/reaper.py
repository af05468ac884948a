"""A small process that outlives a killed driver for a moment and ends what it left behind.

Roles die with their parents, but Ray's agents linger for a minute when the driver is killed. The reaper waits for
the end of its standard input, which the driver holds open (the kernel ends the wait); then it gives the roles
`GRACE_S` to go by themselves, kills what the driver had recorded, and removes Ray's temporary folder.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from treepo_async.process import kill_recorded

GRACE_S = 3.0
REMOVE_S = 10.0


def start(record: Path, temporary: Path) -> "subprocess.Popen[bytes]":
    """Start a reaper for this process.

    Args:
        record: where the driver keeps the pids of its descendants.
        temporary: removed in the end.

    Returns:
        Its handle: close its `stdin` to let it work.
    """
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "treepo_async.cluster.reaper",
            json.dumps([str(record), str(temporary)]),
        ],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def main(record: Path, temporary: Path) -> None:
    """Wait for the driver to be gone, then reap."""
    sys.stdin.buffer.read()
    if record.exists():
        time.sleep(GRACE_S)
        kill_recorded(record)
    _remove(temporary)


def _remove(folder: Path) -> None:
    """Remove a folder in which processes that were just killed may still be writing."""
    deadline = time.monotonic() + REMOVE_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


if __name__ == "__main__":
    main(*(Path(argument) for argument in json.loads(sys.argv[1])))
