import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from treepo_async.cluster import reaper
from treepo_async.cluster.ray_cluster import RayCluster, reap_killed_runs, record_file

SOON_S = 15.0


def is_gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(holds):
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline, f"not in {SOON_S} s"
        time.sleep(0.02)


@pytest.fixture
def started():
    pids = []
    yield pids
    for pid in pids:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def sleeper(started):
    child = subprocess.Popen(["sleep", "60"], start_new_session=True)
    started.append(child.pid)
    yield child
    child.kill()
    child.wait(SOON_S)


def recorded(file, pid):
    file.write_text(json.dumps([(pid, psutil.Process(pid).create_time())]))
    return file


def dead_pid():
    child = subprocess.Popen(["true"])
    child.wait(SOON_S)
    return child.pid


DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from treepo_async.cluster import reaper
from treepo_async.cluster.ray_cluster import RayCluster
record, temporary = Path(sys.argv[1]), Path(sys.argv[2])
watcher = reaper.start(record, temporary)
leftover = subprocess.Popen(["sleep", "60"], start_new_session=True, stdout=subprocess.DEVNULL)
RayCluster(None, record, watcher.pid).record()
print(watcher.pid, leftover.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.faults
def test_what_a_killed_driver_leaves_is_reaped(tmp_path, started):
    record, temporary = tmp_path / "1.json", tmp_path / "ray"
    (temporary / "session").mkdir(parents=True)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(record), str(temporary)],
        stdout=subprocess.PIPE,
        text=True,
    )
    started.append(driver.pid)
    with driver.stdout:
        watcher, leftover = map(int, driver.stdout.readline().split())
    started += [watcher, leftover]
    driver.kill()
    driver.wait(SOON_S)
    assert not is_gone(leftover), "nothing but the reaper ends it"
    wait_for(lambda: is_gone(leftover))
    wait_for(lambda: is_gone(watcher))
    assert not temporary.exists(), "the reaper lived to the end of its work"
    assert not record.exists()


def test_after_an_orderly_end_the_reaper_only_removes_the_temporary_folder(tmp_path, started):
    temporary = tmp_path / "ray"
    (temporary / "session").mkdir(parents=True)
    watcher = reaper.start(tmp_path / "1.json", temporary)
    started.append(watcher.pid)
    assert temporary.exists()
    begin = time.monotonic()
    watcher.stdin.close()
    assert watcher.wait(SOON_S) == 0
    assert time.monotonic() - begin < reaper.GRACE_S, "it waits for nobody"
    assert not temporary.exists()


def test_a_run_records_what_it_started_but_not_its_reaper(tmp_path, started, sleeper):
    watcher = reaper.start(tmp_path / "1.json", tmp_path / "ray")
    started.append(watcher.pid)
    record = tmp_path / "record.json"
    RayCluster(None, record, watcher.pid).record()
    pids = {pid for pid, _ in json.loads(record.read_text())}
    assert sleeper.pid in pids
    assert watcher.pid not in pids
    watcher.stdin.close()
    watcher.wait(SOON_S)


def test_leftovers_of_runs_whose_driver_is_gone_are_ended(tmp_path, sleeper):
    record = recorded(record_file(tmp_path, dead_pid()), sleeper.pid)
    assert reap_killed_runs(tmp_path) == 1
    assert sleeper.wait(SOON_S) == -signal.SIGKILL
    assert not record.exists()
    assert reap_killed_runs(tmp_path) == 0


def test_a_run_whose_driver_lives_is_left_alone(tmp_path, sleeper):
    record = recorded(record_file(tmp_path, os.getpid()), sleeper.pid)
    assert reap_killed_runs(tmp_path) == 0
    assert sleeper.poll() is None
    assert record.exists()


def test_a_run_of_another_machine_that_shares_the_folder_is_left_alone(tmp_path, sleeper):
    own = record_file(tmp_path, dead_pid())
    other = recorded(own.with_name(f"other-{own.name}"), sleeper.pid)
    assert reap_killed_runs(tmp_path) == 0
    assert sleeper.poll() is None
    assert other.exists()
