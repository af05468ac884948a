import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from treepo_async import process
from treepo_async.errors import ConfigError
from treepo_async.process import (
    descendants,
    free_ports,
    kill_all,
    kill_recorded,
    record_family,
    run_child,
    start_child,
    stop_child,
)

SOON_S = 10.0


def is_gone(pid):
    """A zombie counts: where nobody reaps orphans, it is all that is left."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(pid, timeout_s=SOON_S):
    deadline = time.monotonic() + timeout_s
    while not is_gone(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def started():
    """Pids that are killed after the test, whatever it did."""
    pids = []
    yield pids
    for pid in pids:
        if not is_gone(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def sleeper(started):
    child = subprocess.Popen(["sleep", "60"])
    started.append(child.pid)
    yield child
    child.kill()
    child.wait(SOON_S)


def shell(started, script):
    """A child whose first line of output is the pid of a child of its own."""
    child = start_child(
        ["sh", "-c", script], env={}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started.append(child.pid)
    with child.stdout:
        grandchild = int(child.stdout.readline())
    started.append(grandchild)
    return child, grandchild


STARTS_A_CHILD = """
import subprocess, sys, time
from treepo_async.process import start_child
if sys.argv[1] == "bound":
    child = start_child(["sleep", "60"], env={}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
else:
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["bound", "free"])
def test_a_child_is_gone_when_its_parent_is_killed(started, kind):
    """The free one, started without the binding, is the control: it lives on."""
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS_A_CHILD, kind], stdout=subprocess.PIPE, text=True
    )
    started.append(parent.pid)
    with parent.stdout:
        grandchild = int(parent.stdout.readline())
    started.append(grandchild)
    assert not is_gone(grandchild)
    parent.kill()
    parent.wait(SOON_S)
    if kind == "bound":
        assert wait_gone(grandchild)
    else:
        assert not wait_gone(grandchild, timeout_s=0.2)


def test_a_child_gets_its_variables_beside_those_of_its_parent():
    child = start_child(
        ["sh", "-c", "echo $MINE; test -n \"$PATH\" && echo path"],
        env={"MINE": "yes"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    out, _ = child.communicate(timeout=SOON_S)
    assert out == b"yes\npath\n"


def test_a_child_that_obeys_is_stopped_with_what_it_started(started):
    child, grandchild = shell(started, "setsid sleep 60 & echo $!; wait")
    begin = time.monotonic()
    stop_child(child, timeout_s=30)
    assert time.monotonic() - begin < 5
    assert child.returncode == -signal.SIGTERM
    assert wait_gone(grandchild)


def test_a_child_that_ignores_sigterm_is_killed_at_the_deadline_with_what_it_started(started):
    child, grandchild = shell(started, "trap '' TERM; sleep 60 & echo $!; wait")
    begin = time.monotonic()
    stop_child(child, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - begin < 5
    assert child.returncode == -signal.SIGKILL
    assert wait_gone(grandchild)


def test_what_a_child_starts_after_sigterm_is_killed_too(started, tmp_path):
    file = tmp_path / "late"
    script = f"trap 'setsid sleep 60 & echo $! > {file}' TERM; sleep 60 & echo $!; while :; do wait; done"  # fmt: skip
    child, _ = shell(started, script)
    stop_child(child, timeout_s=0.5)
    late = int(file.read_text())
    started.append(late)
    assert wait_gone(late)


def test_stopping_a_child_that_has_ended_gives_its_code():
    child = start_child(["sh", "-c", "exit 3"], env={}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    child.wait(SOON_S)
    stop_child(child, timeout_s=1)
    assert child.returncode == 3


def test_descendants_are_found_over_generations(started):
    child, grandchild = shell(started, "sh -c 'sleep 60; :' & echo $!; wait")
    deadline = time.monotonic() + SOON_S
    while len(descendants(child.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    found = [process.pid for process in descendants(child.pid)]
    assert found[0] == grandchild
    assert len(found) == 2
    stop_child(child, timeout_s=1)
    assert descendants(child.pid) == []


def test_only_the_process_that_is_meant_is_killed(sleeper):
    born = psutil.Process(sleeper.pid).create_time()
    assert kill_all([(sleeper.pid, born - 10), (sleeper.pid, born + 10)]) == 0
    assert sleeper.poll() is None
    assert kill_all([(sleeper.pid, born)]) == 1
    assert sleeper.wait(SOON_S) == -signal.SIGKILL
    assert kill_all([(sleeper.pid, born)]) == 0, "it is gone"


def test_a_recorded_family_is_killed_and_the_record_removed(started, tmp_path):
    child, grandchild = shell(started, "sleep 60 & echo $!; wait")
    file = tmp_path / "1.json"
    record_family(file, child.pid)
    assert not is_gone(grandchild)
    assert kill_recorded(file) == 1
    assert wait_gone(grandchild)
    assert list(tmp_path.iterdir()) == []
    assert kill_recorded(file) == 0
    stop_child(child, timeout_s=1)


def test_a_descendant_can_be_left_out_of_the_record(started, tmp_path):
    child, grandchild = shell(started, "sleep 60 & echo $!; wait")
    file = tmp_path / "1.json"
    record_family(file, child.pid, without=grandchild)
    assert kill_recorded(file) == 0
    assert not is_gone(grandchild)
    stop_child(child, timeout_s=1)


@pytest.fixture
def few_ports(monkeypatch, tmp_path):
    """All ports but two are the kernel's."""
    first = next(p for p in free_ports(3, "127.0.0.2") if p + 2 < 2**16)
    pair = (first, first + 1)
    monkeypatch.setattr(process, "FIRST_PORT", first)
    file = tmp_path / "range"
    file.write_text(f"{first + 2} 65535")
    monkeypatch.setattr(process, "_EPHEMERAL_PORTS", file)
    return pair


def test_free_ports_are_none_that_the_kernel_hands_out():
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        assert low <= any_port.getsockname()[1] <= high
    assert not [port for port in free_ports(50) if low <= port <= high]


def test_free_ports_differ_and_can_be_bound():
    ports = free_ports(3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", port))


def test_a_child_that_is_run_gives_its_exit_code_and_leaves_its_output(tmp_path):
    log = tmp_path / "log"
    log.write_text("of an earlier one")
    command = [
        sys.executable,
        "-c",
        "import sys; print('out'); sys.stderr.write('err'); sys.exit(3)",
    ]
    assert run_child(command, log_file=log, timeout_s=60, stop_s=SOON_S) == 3
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_a_child_that_does_not_end_in_time_is_ended_and_gives_minus_one(tmp_path):
    log = tmp_path / "log"
    words = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    assert run_child([sys.executable, "-c", words], log_file=log, timeout_s=2, stop_s=SOON_S) == -1
    assert is_gone(int(log.read_text()))


def test_an_address_that_this_machine_has_not_is_refused_by_its_key():
    with pytest.raises(
        ConfigError, match=r"203\.0\.113\.7 is no address of this machine \(cluster\.host"
    ):
        free_ports(1, "203.0.113.7")


@pytest.mark.parametrize("taken", ["127.0.0.1", "127.0.0.2"])
def test_free_ports_of_an_address_are_free_there_and_at_loopback(few_ports, taken):
    first, second = few_ports
    with socket.socket() as other:
        other.bind((taken, first))
        assert free_ports(1, "127.0.0.2") == [second]
