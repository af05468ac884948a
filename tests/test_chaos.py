"""What a plan does to a process, seen from outside; and that without one a point costs a call of an empty function."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from treepo_async import chaos

WORK = """
from treepo_async import chaos
for number in range(1, 5):
    word = chaos.point("role.place")
    print(number, word, flush=True)
"""


@pytest.fixture
def act(tmp_path):
    """`act(rule)` runs `WORK` under a plan with that rule. Gives the process's code, its lines and the log's."""
    log = tmp_path / "chaos.log"

    def run(rule, *, role="", name="role.place", work=WORK):
        file = tmp_path / "plan.json"
        file.write_text(json.dumps({"log": str(log), "points": {name: rule}}))
        env = os.environ | {chaos.PLAN_VARIABLE: str(file), chaos.ROLE_VARIABLE: role}
        done = subprocess.run(
            [sys.executable, "-c", work], env=env, capture_output=True, text=True, timeout=20
        )
        told = log.read_text().splitlines() if log.exists() else []
        return done.returncode, done.stdout.splitlines(), told

    return run


ALL = ["1 None", "2 None", "3 None", "4 None"]


def test_a_kill_ends_the_process_at_the_wanted_call_and_is_in_the_log_before(act):
    code, lines, told = act({"act": "kill", "hit": 3})
    assert code == -signal.SIGKILL
    assert lines == ALL[:2]
    (line,) = told
    name, word, pid = line.split()
    assert (name, word) == ("role.place", "kill")
    assert int(pid) > 1


def test_it_acts_as_often_as_the_plan_says_over_all_processes(act):
    rule = {"act": "kill", "hit": 2, "times": 2}
    assert [act(rule)[0] for _ in range(3)] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert len(act(rule)[2]) == 2


def test_within_one_process_it_acts_at_each_call_from_the_wanted_one_on(act):
    _, lines, told = act({"act": "short", "hit": 2, "times": 2})
    assert lines == ["1 None", "2 short", "3 short", "4 None"]
    assert len(told) == 2


def test_a_rule_with_a_role_is_for_the_processes_whose_role_begins_so(act):
    rule = {"act": "kill", "role": "actor"}
    assert act(rule, role="replay-0")[:2] == (0, ALL)
    assert act(rule)[:2] == (0, ALL)
    assert act(rule, role="actor-1")[0] == -signal.SIGKILL


def test_points_that_the_plan_does_not_name_do_nothing(act):
    assert act({"act": "kill"}, name="role.other") == (0, ALL, [])


@pytest.mark.parametrize(("word", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_a_full_or_broken_disk_is_an_error_with_its_number(act, word, number):
    work = """
from treepo_async import chaos
try:
    chaos.point("role.place")
except OSError as error:
    print(error.errno, "role.place" in str(error))
print(chaos.point("role.place"))
"""
    assert act({"act": word}, work=work)[:2] == (0, [f"{number} True", "None"])


def test_a_stopped_process_goes_on_when_it_is_let(tmp_path):
    plan, log = tmp_path / "plan.json", tmp_path / "chaos.log"
    plan.write_text(json.dumps({"log": str(log), "points": {"role.place": {"act": "stop"}}}))
    child = subprocess.Popen(
        [sys.executable, "-c", WORK],
        env=os.environ | {chaos.PLAN_VARIABLE: str(plan)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        os.kill(child.pid, signal.SIGCONT)
        assert child.communicate(timeout=20)[0].splitlines() == ALL
    finally:
        child.kill()
        child.wait()


def test_a_sleep_lasts_as_long_as_the_plan_says(act):
    work = """
import time
from treepo_async import chaos
begin = time.monotonic()
chaos.point("role.place")
print(time.monotonic() - begin >= 0.05)
"""
    assert act({"act": "sleep", "seconds": 0.05}, work=work)[:2] == (0, ["True"])


def test_without_a_plan_a_point_is_an_empty_function():
    assert chaos.PLAN_VARIABLE not in os.environ
    assert chaos.point is chaos._no_point
    assert chaos.point("role.place") is None
