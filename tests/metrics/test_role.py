import asyncio
import json
import signal
import subprocess
import sys
import time

import pytest

from treepo_async.metrics.role import cause_of

SOON_S = 10.0

RUNS_A_ROLE = """
import asyncio
from treepo_async.metrics.role import run_role
async def work():
    try:
        print("working", flush=True)
        await asyncio.sleep(60)
    finally:
        print("tidied up", flush=True)
asyncio.run(run_role(work()))
"""


def test_a_role_tidies_up_at_sigterm_and_leaves_ctrl_c_to_the_driver():
    role = subprocess.Popen([sys.executable, "-c", RUNS_A_ROLE], stdout=subprocess.PIPE, text=True)
    assert json.loads(role.stdout.readline())["event"] == "clock"
    assert role.stdout.readline() == "working\n"
    role.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert role.poll() is None
    role.terminate()
    out, _ = role.communicate(timeout=SOON_S)
    assert (role.returncode, out) == (0, "tidied up\n")


async def fail_inside_of_groups():
    async def fail():
        raise LookupError("the cause\nand more")

    async with asyncio.TaskGroup() as outer, asyncio.TaskGroup() as inner:
        inner.create_task(fail())
        outer.create_task(asyncio.sleep(60))


async def test_the_cause_is_the_first_failure_inside_of_all_groups():
    with pytest.raises(ExceptionGroup) as caught:
        await fail_inside_of_groups()
    assert cause_of(caught.value) == "LookupError: the cause"


@pytest.mark.parametrize(
    "start",
    ["asyncio.run(run_role(afail()))", "run_blocking_role(fail)"],
    ids=["async", "blocking"],
)
def test_a_role_that_fails_says_why_and_leaves_its_traceback(start):
    program = f"""
import asyncio
from treepo_async.metrics.role import run_blocking_role, run_role
def fail():
    raise ValueError("no such thing")
async def afail():
    fail()
{start}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=SOON_S
    )
    assert done.returncode == 1
    clock, failed = map(json.loads, done.stdout.splitlines())
    assert clock["event"] == "clock"
    assert failed == {"event": "failed", "cause": "ValueError: no such thing"}
    assert "Traceback" in done.stderr
