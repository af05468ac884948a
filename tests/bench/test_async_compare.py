"""Whole comparisons: simulated ones for what is written and what is not repeated, a small one with scripted processes."""

import csv
import json

import pytest

from treepo_async.bench import async_real
from treepo_async.bench.async_arms import settings_of
from treepo_async.bench.async_cells import parse
from treepo_async.bench.async_compare import compare, real_words
from treepo_async.bench.async_rows import Arm
from treepo_async.config.command_line import parse as parse_run
from treepo_async.errors import ConfigError, TreepoError

SIM = ["backend=sim", "steps=8", "warm_up=3", "actors=2", "prompts=4"]


def compared(out, *words):
    told = []
    compare(parse([*words, f"out={out}"]), told.append)
    return told


def test_a_comparison_writes_its_files_and_measures_no_cell_twice(tmp_path):
    first = compared(tmp_path, *SIM, "arms=sync", "seeds=0,1")
    assert [line[:5] for line in first[:-1]] == ["[1/2]", "[2/2]"]
    more = compared(tmp_path, *SIM, "arms=sync,one_step", "seeds=0")
    assert ["one_step" in line for line in more[:-1]] == [True]
    with (tmp_path / "cells.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    cells = {(row["arm"], row["seed"]) for row in rows}
    assert cells == {("sync", "0"), ("sync", "1"), ("one_step", "0")}
    assert "| sync | 2 | " in (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_a_cell_that_was_not_finished_is_measured_again(tmp_path):
    compared(tmp_path, *SIM, "arms=sync", "seeds=0")
    done = tmp_path / "cells" / "sync-seed0"
    done.rename(done.with_name("sync-seed0.rough"))
    assert "[1/1]" in compared(tmp_path, *SIM, "arms=sync", "seeds=0")[0]


def test_cells_of_another_set_up_are_not_mixed_in(tmp_path):
    compared(tmp_path, *SIM, "arms=sync", "seeds=0")
    with pytest.raises(ConfigError, match="measured with other keys"):
        compared(tmp_path, *SIM, "arms=sync", "seeds=0", "tail=5")


@pytest.mark.timeout(50)
def test_scripted_processes_keep_the_bound_of_their_arm_and_overlap_where_it_says_so(tmp_path):
    small = ["actors=2", "slots=1", "prompts=2", "width=4", "depth=8", "token_ms=1", "seconds=0.5"]
    compared(tmp_path, *small, "arms=sync,async_inflight", "seeds=0", "staleness=2")
    with (tmp_path / "steps.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    lags = {
        arm: [int(row["staleness_max"]) for row in rows if row["arm"] == arm]
        for arm in ("sync", "async_inflight")
    }
    assert set(lags["sync"]) == {0}
    assert 0 < max(lags["async_inflight"]) <= 2
    with (tmp_path / "ledger.csv").open() as stream:
        ledger = list(csv.DictReader(stream))
    assert {row["role"] for row in ledger} == {"learner", "actor", "engine"}
    idle = {
        row["arm"]: row for row in ledger if (row["role"], row["account"]) == ("engine", "idle")
    }
    assert float(idle["sync"]["seconds"]) > 0, "no request runs while the learner trains"
    # waits are summed over both slots of both actors, so none is more than the whole
    assert all(float(row["seconds"]) > -0.1 for row in ledger)
    assert not list((tmp_path / "work").glob("*/replay"))


def test_a_scripted_process_that_fails_ends_the_comparison_with_its_words(tmp_path):
    tiny = ["actors=1", "slots=1", "prompts=1", "width=4", "depth=8", "token_ms=1"]
    with pytest.raises(TreepoError, match="publishing takes"):
        compared(tmp_path, *tiny, "publish_ms=9000", "arms=sync", "seeds=0")


@pytest.mark.parametrize("arm", Arm)
def test_a_real_run_has_steps_for_its_stock_behind_those_that_count_in_every_arm(tmp_path, arm):
    options = parse(["backend=real", "steps=20", "staleness=3"])
    config = parse_run(real_words(options, arm, 0, tmp_path))
    assert (config.steps, config.eval.every) == (23, 23)
    assert config.replay.max_staleness <= 3


def test_a_run_that_fails_is_told_with_its_last_words(tmp_path):
    settings = settings_of(Arm.SYNC, staleness=1, update_mode="retract")
    words = async_real.keys_of(
        settings, seed=0, steps=2, run_dir=tmp_path / "run", more=["no.such_key=1"]
    )
    with pytest.raises(TreepoError, match=r"sync seed 0: the run ended with 2: error: .*no"):
        async_real.run_cell(Arm.SYNC, words, tmp_path / "run", seed=0, warm_up=1, last=2)
