"""Ranks as processes that do nothing but end, die or hang: no process group, no model."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.fakes import events_in
from treepo_async.errors import ConfigError, TreepoError
from treepo_async.learner import node
from treepo_async.learner.node import run_ranks


def note(folder, number):
    (folder / f"{number}-{os.getpid()}").touch()


def die_once(folder, number, *, by=signal.SIGKILL):
    """In the first start rank 1 dies, and the others hang, as in a collective."""
    is_first = not list(folder.glob(f"{number}-*"))
    note(folder, number)
    if is_first:
        while number == 1 and not list(folder.glob("0-*")):
            time.sleep(0.01)
        if number == 1:
            os.kill(os.getpid(), by)
        time.sleep(60)


def fail(folder, error, number):
    note(folder, number)
    if number == 1:
        raise error
    time.sleep(60)


def linger(folder, number):
    note(folder, number)
    if number == 1:
        time.sleep(60)


def alive(folder):
    pids = [int(file.name.partition("-")[2]) for file in folder.iterdir()]
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_all_ranks_run_once_when_all_end_well(tmp_path):
    run_ranks(lambda: partial(note, tmp_path), num_ranks=3, max_restarts=0)
    assert sorted(file.name[0] for file in tmp_path.iterdir()) == ["0", "1", "2"]


def test_a_killed_rank_makes_all_start_again_with_new_work(tmp_path, capsys):
    starts = []

    def make_work():
        starts.append(time.monotonic())
        return partial(die_once, tmp_path)

    run_ranks(make_work, num_ranks=2, max_restarts=1)
    assert len(starts) == 2
    assert len(list(tmp_path.iterdir())) == 4
    assert starts[1] - starts[0] < 5, "nobody waited for those that hung"
    (alarm,) = events_in(capsys.readouterr().out, "alarm")
    assert alarm["detail"] == "rank 1 was killed by SIGKILL"
    assert alive(tmp_path) == []


def test_a_terminated_rank_does_not_count_as_done(tmp_path):
    run_ranks(lambda: partial(die_once, tmp_path, by=signal.SIGTERM), num_ranks=2, max_restarts=1)
    assert len(list(tmp_path.iterdir())) == 4


def test_too_many_deaths_end_the_run_with_the_cause(tmp_path):
    broken = partial(fail, tmp_path, RuntimeError("Connection closed by peer"))
    with pytest.raises(TreepoError, match=r"gave up after 1 restarts: rank 1: RuntimeError: Conn"):
        run_ranks(lambda: broken, num_ranks=2, max_restarts=1)
    assert len(list(tmp_path.glob("1-*"))) == 2
    assert alive(tmp_path) == []


def test_a_cause_that_lies_in_the_run_is_not_tried_again(tmp_path):
    broken = partial(fail, tmp_path, ConfigError("learner.lr"))
    with pytest.raises(TreepoError, match=r"^rank 1: ConfigError: learner\.lr$"):
        run_ranks(lambda: broken, num_ranks=2, max_restarts=5)
    assert len(list(tmp_path.glob("1-*"))) == 1


def test_a_rank_that_stays_after_the_others_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "END_S", 0.3)
    with pytest.raises(TreepoError, match=r"ranks 1 did not end 0\.3 s after"):
        run_ranks(lambda: partial(linger, tmp_path), num_ranks=2, max_restarts=0)
    assert alive(tmp_path) == []


def vanish(folder, number):
    note(folder, number)
    if number == 1:
        os._exit(3)
    time.sleep(60)


def test_a_rank_that_ends_without_a_word_is_named_with_its_code_and_tried_again(tmp_path):
    with pytest.raises(TreepoError, match=r"gave up after 1 restarts: rank 1 ended with code 3$"):
        run_ranks(lambda: partial(vanish, tmp_path), num_ranks=2, max_restarts=1)
    assert len(list(tmp_path.glob("1-*"))) == 2
