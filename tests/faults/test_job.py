"""The end of a job whose processes end by themselves at the worst time."""

import os
import subprocess
import sys

import psutil
import pytest

from tests.faults.job import Job, JobError, kill_all


class Unseen(subprocess.Popen):
    """A child whose end is not seen when it is asked for, as if it came right after."""

    def poll(self):
        return None


class Ended(Job):
    """A job whose actor ends by itself right before it is to be killed."""

    def start(self):
        self._process = Unseen([sys.executable, "-c", "exit(3)"], start_new_session=True)
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.log_file.write_text("no engine")
        return self


def test_a_process_that_is_reaped_in_between_keeps_no_other_alive():
    gone, alive = (subprocess.Popen(["sleep", "30"]) for _ in range(2))
    family = [psutil.Process(gone.pid), psutil.Process(alive.pid)]
    gone.kill()
    gone.wait()
    try:
        kill_all(family)
        assert alive.wait(timeout=10) == -9
    finally:
        alive.kill()
        alive.wait()


def test_an_actor_that_ends_by_itself_is_no_crash_but_closes_all_the_same(tmp_path):
    with pytest.raises(JobError, match="ended by itself with 3: no engine"):
        Ended(tmp_path / "trees.jsonl", []).start().crash()
    Ended(tmp_path / "trees.jsonl", []).start().close()
