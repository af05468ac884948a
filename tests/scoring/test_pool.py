"""The pool with real processes; what a scorer does wrong stands in the response, see `scorers`."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.fakes import until
from treepo_async.errors import ConfigError
from treepo_async.scoring.failures import Failure
from treepo_async.scoring.pool import Pool

ROOT = Path(__file__).resolve().parents[2]
OBEY, EQUAL = "tests.scoring.scorers:obey", "tests.scoring.scorers:equal"
LONG_S = 30.0


def pool_of(workers=1, *, name=OBEY, timeout_s=LONG_S):
    return Pool(name, workers=workers, timeout_s=timeout_s)


def is_gone(pid):
    """A zombie counts: where nobody reaps orphans, it is all that is left."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def pid_of(pool, tmp_path):
    """Of a pool with one worker."""
    file = tmp_path / "pid"
    assert await pool.score([f"pid:{file}"], "") == [1.0]
    return int(file.read_text())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module on the Python path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        return tmp_path / f"{name}.py"

    return write


async def test_every_response_gets_its_own_score_in_order():
    responses = [str(i % 7) for i in range(200)]
    async with pool_of(2, name=EQUAL) as pool:
        assert await pool.score(responses, "3") == [float(r == "3") for r in responses]
        assert await pool.score([], "3") == []
    assert pool.failures.counts == {}


async def test_texts_arrive_as_they_are():
    hostile = "\0\ud800 \N{SNOWMAN} \"'{\n" + "x" * 200_000
    async with pool_of(name=EQUAL) as pool:
        assert await pool.score([hostile], hostile) == [1.0]


async def test_trees_are_scored_side_by_side():
    async with pool_of(2, name=EQUAL) as pool:
        scores = await asyncio.gather(*(pool.score(["a", "b"], key) for key in "ab" * 20))
    assert scores == [[1.0, 0.0], [0.0, 1.0]] * 20


async def test_as_many_responses_as_there_are_workers_are_scored_at_once(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    async with pool_of(2) as pool:
        assert await pool.score([f"meet:{one}|{other}", f"meet:{other}|{one}"], "") == [1.0, 1.0]


WRONGS = {
    "raise": Failure.RAISED,
    "sys.exit": Failure.RAISED,
    "allocate": Failure.RAISED,
    "bad key": Failure.BAD_KEY,
    "os._exit": Failure.DIED,
    "segfault": Failure.DIED,
    "kill": Failure.DIED,
    "close": Failure.DIED,
    "nan": Failure.NOT_FINITE,
    "inf": Failure.NOT_FINITE,
    "text": Failure.NOT_FINITE,
    "none": Failure.NOT_FINITE,
    "array": Failure.NOT_FINITE,
    "huge": Failure.NOT_FINITE,
}


@pytest.mark.parametrize(("wrong", "failure"), WRONGS.items())
async def test_a_scorer_that_goes_wrong_costs_its_own_response_only(wrong, failure):
    async with pool_of() as pool:
        scores = await pool.score(["right", wrong, "right", wrong, "right"], "")
    np.testing.assert_array_equal(scores, [1, np.nan, 1, np.nan, 1])
    assert pool.failures.counts == {failure: 2}


async def test_a_scorer_that_hangs_is_killed_at_its_deadline_and_others_are_scored(tmp_path):
    async with pool_of(timeout_s=3.0) as pool:
        pid = await pid_of(pool, tmp_path)
        np.testing.assert_array_equal(await pool.score(["loop", "right"], ""), [np.nan, 1])
        assert pool.failures.counts == {Failure.TIMED_OUT: 1}
        assert await pid_of(pool, tmp_path) != pid
        await until(lambda: is_gone(pid))


@pytest.mark.parametrize(("returned", "score"), [("scalar", 0.5), ("bool", 1.0), ("outside", -3.0)])
async def test_any_finite_number_is_an_accuracy(returned, score):
    async with pool_of() as pool:
        assert await pool.score([returned], "") == [score]


async def test_what_a_scorer_prints_is_logged_and_changes_no_score(caplog):
    with caplog.at_level(logging.WARNING):
        async with pool_of() as pool:
            assert await pool.score(["print", "right"], "") == [1.0, 1.0]
    printed = [m.removeprefix("a scorer printed: ") for m in caplog.messages]
    assert "\n".join(printed) == "a whole line\nno end of line from below"


async def test_a_scorer_that_floods_its_output_is_not_held_up_and_the_log_is_bounded(caplog):
    with caplog.at_level(logging.WARNING):
        async with pool_of() as pool:
            assert await pool.score(["flood:4"], "") == [1.0]
    assert 10_000 < len(caplog.text) < 100_000
    assert caplog.messages[-1] == "what else this scoring process prints is not shown"


async def test_a_scorer_cannot_read_what_is_typed():
    async with pool_of() as pool:
        assert await pool.score(["stdin"], "") == [1.0]


async def test_a_scorer_that_forks_disturbs_no_other_response():
    async with pool_of(name=OBEY) as pool:
        assert await pool.score(["fork", "right", "fork", "right"], "") == [1.0] * 4


@pytest.mark.parametrize("order", ["leave child", "leave orphan"])
async def test_what_a_killed_scorer_has_started_is_killed_with_it(tmp_path, order):
    file = tmp_path / "child"
    async with pool_of(timeout_s=3.0) as pool:
        assert np.isnan(await pool.score([f"{order}:{file}"], "")).all()
        await until(lambda: is_gone(int(file.read_text())))


async def test_a_fork_bomb_is_killed_as_a_whole_and_others_are_scored(tmp_path):
    file = tmp_path / "touched"
    async with pool_of(timeout_s=2.0) as pool:
        scores = await pool.score([f"fork bomb:{file}", "right"], "")
        np.testing.assert_array_equal(scores, [np.nan, 1])
        await asyncio.sleep(0.2)
        touched = file.stat().st_mtime_ns
        await asyncio.sleep(0.5)
        assert file.stat().st_mtime_ns == touched, "some of it is left"
        assert await pool.score(["right"] * 3, "") == [1.0] * 3
    assert pool.failures.counts == {Failure.TIMED_OUT: 1}


async def test_the_end_of_a_scorer_is_seen_though_what_it_started_goes_on():
    async with pool_of(timeout_s=10.0) as pool:
        attempt = await pool.attempt("exit beside child", "")
    assert (attempt.failure, attempt.detail) == (
        Failure.DIED,
        "its process ended with exit code 3",
    )


async def test_memory_that_runs_out_is_taken_from_the_scoring_process():
    async with pool_of() as pool:
        assert await pool.score(["oom_score_adj"], "") == [1000.0]


@pytest.mark.parametrize(
    "reply",
    [
        {"number": 7, "accuracy": 1.0},
        {"number": 1, "accuracy": "1.0"},
        {"number": 1, "accuracy": float("nan")},
        {"number": 1, "failure": "bored", "detail": "x"},
        {"number": 1, "failure": "raised", "detail": 3},
        {"number": 1, "failure": ["raised"], "detail": "x"},
        {},
        [1],
    ],
)
async def test_a_reply_that_means_nothing_is_no_score(reply):
    async with pool_of() as pool:
        np.testing.assert_array_equal(
            await pool.score([f"send:{json.dumps(reply)}", "right"], ""), [np.nan, 1]
        )
    assert pool.failures.counts == {Failure.DIED: 1}


async def test_a_reply_that_claims_to_be_huge_is_not_waited_for():
    async with pool_of() as pool:
        attempt = await pool.attempt(f"claim:{2**31}", "")
    assert attempt.failure is Failure.DIED
    assert attempt.detail == f"a scoring worker sent {2**31} bytes, at most {2**16} are read"


async def test_a_process_that_dies_between_responses_costs_no_response(tmp_path):
    async with pool_of() as pool:
        pid = await pid_of(pool, tmp_path)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: is_gone(pid))
        await asyncio.sleep(0.05)  # the closed connection is seen at the next turn of the loop
        assert await pool.score(["right"], "") == [1.0]
    assert pool.failures.counts == {}


async def test_an_abandoned_score_is_not_taken_for_the_next_one(tmp_path):
    async with pool_of() as pool:
        pid = await pid_of(pool, tmp_path)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await pool.score(["loop"], "")
        assert await pool.score(["outside"], "") == [-3.0]
        assert is_gone(pid)
    assert pool.failures.counts == {}


@pytest.mark.parametrize("ending", ["normal", "error"])
async def test_no_process_is_left_behind(ending):
    before = set(psutil.Process().children(recursive=True))
    with contextlib.suppress(LookupError):
        async with pool_of(3):
            workers = set(psutil.Process().children(recursive=True)) - before
            assert len(workers) == 3
            if ending == "error":
                raise LookupError
    assert not any(worker.is_running() for worker in workers)


RUNS_A_POOL = """
import asyncio, sys
from treepo_async.scoring.pool import Pool
async def main():
    async with Pool("tests.scoring.scorers:obey", workers=1, timeout_s=60) as pool:
        await pool.score(["pid:" + sys.argv[1], "loop"], "")
asyncio.run(main())
"""


@pytest.mark.faults
def test_a_hanging_scorer_is_gone_when_its_parent_is_killed(tmp_path):
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", RUNS_A_POOL, str(file)], cwd=ROOT)
    deadline = time.monotonic() + LONG_S
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = int(file.read_text())
    assert not is_gone(pid)
    parent.kill()
    parent.wait(LONG_S)
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(pid)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def score(r, a: return 1", "SyntaxError"),
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("import sys; sys.exit(1)", "SystemExit"),
        ("1 / 0", "division by zero"),
        ("other = 1", "no attribute 'score'"),
        ("score = 3", "is a int, not a function"),
        ("import os; os._exit(5)", "its process ended with exit code 5"),
        ("import os; os.kill(os.getpid(), 9)", "its process ended with signal 9"),
    ],
)
async def test_a_module_that_cannot_be_imported_is_told_at_the_start(module, text, reason):
    module("broken_rules", text)
    before = set(psutil.Process().children())
    with pytest.raises(ConfigError, match=rf"broken_rules:score'.*{reason}"):
        async with pool_of(2, name="broken_rules:score"):
            pass
    assert set(psutil.Process().children()) <= before


async def test_a_process_that_cannot_be_replaced_ends_the_scoring(module):
    file = module("brief_rules", "import os\ndef score(r, a):\n    os._exit(1)\n")
    async with pool_of(name="brief_rules:score") as pool:
        assert np.isnan(await pool.score(["a"], "")).all()
        file.write_text("1 / 0")
        with pytest.raises(ExceptionGroup) as raised:
            await pool.score(["b"], "")
    assert raised.group_contains(ConfigError, match="division by zero")


async def test_an_abandoned_start_is_not_taken_for_a_process_that_can_score(module):
    file = module("slow_rules", "import os\ndef score(r, a):\n    os._exit(1)\n")
    async with pool_of(name="slow_rules:score", timeout_s=10.0) as pool:
        assert np.isnan(await pool.score(["a"], "")).all()
        file.write_text("import time\ntime.sleep(60)\n")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await pool.score(["b"], "")
        file.write_text("def score(r, a):\n    return 1.0  # at last\n")
        assert await pool.score(["c"], "") == [1.0]


async def test_a_start_that_fails_does_not_wait_for_the_others(module, tmp_path):
    text = f"""
import pathlib, time
try:
    pathlib.Path({str(tmp_path / "first")!r}).touch(exist_ok=False)
except FileExistsError:
    1 / 0
time.sleep(1000)
"""
    module("uneven_rules", text)
    with pytest.raises(ConfigError, match="division by zero"):
        async with pool_of(2, name="uneven_rules:score"):
            pass


async def test_mathematics_that_hangs_is_killed_and_the_next_response_is_scored():
    async with pool_of(name="math", timeout_s=5.0) as pool:
        scores = await pool.score([r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac{2}{4}}"], "1/2")
    np.testing.assert_array_equal(scores, [np.nan, 1])
    assert pool.failures.counts == {Failure.TIMED_OUT: 1}
