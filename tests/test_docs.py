"""The documents say what is there: names of metrics, keys on command lines, files in the layout."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from tests.tree import vectors
from treepo_async.config.command_line import parse
from treepo_async.config.schema import (
    CORRECTIONS,
    ESTIMATORS,
    LOSSES,
    MASKS,
    NORMALIZERS,
    PROXIMALS,
)
from treepo_async.learner.loss.result import ROW_MEANS
from treepo_async.metrics.categories import KINDS, Category
from treepo_async.metrics.record import EVAL_NAMES, STEP_TABLES, Recorder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    return [
        line.strip()
        for block in re.findall(r"```\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
        if re.match(r"\s*(\.venv/bin/)?python launch/run\.py", line)
    ]


def words(command):
    spelled = command.partition("#")[0].replace("data=...", "data=problems.jsonl")
    return [word for word in shlex.split(spelled)[2:] if not word.startswith("--")]


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_has_keys_and_values_that_are_accepted(command):
    parse(words(command))


def test_the_readme_has_commands():
    assert len(commands()) > 3


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_every_config_file_is_accepted(file):
    parse(
        [f"config={file.stem}", *(["data=problems.jsonl"] if "model:" in file.read_text() else [])]
    )


def test_every_metric_is_documented_and_every_documented_metric_exists():
    text = (ROOT / "docs" / "metrics.md").read_text()
    documented = {
        name
        for row in re.findall(r"^\| (.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", row)
    }
    written = {name for name in _record() if "/" in name}
    families = ("leases/", "trees/", "time/", "lag/", "level/", "ledger/")
    assert {n for n in written if not n.startswith(families)} == {
        n for n in documented if not n.startswith(families)
    }
    assert {n for n in written if n.startswith("time/")} <= documented
    rows = {f"{axis}/.../{name}" for axis in STEP_TABLES for name in ("tokens", "ess", *ROW_MEANS)}
    assert rows == {n for n in documented if n.startswith(("lag/", "level/"))}
    ledger = {f"ledger/.../{name}" for name in (*Category, "seconds")}
    assert ledger == {n for n in documented if n.startswith("ledger/")}


def test_every_category_and_kind_of_the_time_ledger_is_in_its_table():
    text = (ROOT / "docs" / "metrics.md").read_text().partition("## The time ledger")[2]
    header = next(line for line in text.splitlines() if line.startswith("| category |"))
    assert [cell.split()[0] for cell in header.strip("| ").split(" | ")[1:]] == list(KINDS)
    rows = re.findall(r"^\| (\w+) \|", text.partition("## The trace")[0], re.MULTILINE)
    assert rows[1:] == list(Category)


def test_every_estimator_is_documented_with_the_values_of_the_example():
    text = (ROOT / "docs" / "estimators.md").read_text()
    assert set(re.findall(r"\*\*`(\w+)`\*\*", text)) == set(ESTIMATORS)
    expected = vectors.TREES["C7_chain_then_branch_after_fallback"]["expected"]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == list(ESTIMATORS)
    for name, *cells in rows:
        for cell, values in zip(cells, expected[name], strict=False):
            found = [float(value) for value in cell.split(", ")]
            assert found == pytest.approx(np.atleast_1d(values).tolist(), abs=6e-4), name


def test_the_methods_of_the_corrections_have_keys_that_are_accepted():
    text = (ROOT / "docs" / "corrections.md").read_text()
    methods = text.partition("## Methods by keys")[2].partition("\n## ")[0]
    commands = re.findall(r"`([a-z_]+=[^`]*)`", methods.partition("What is refused")[0])
    assert len(commands) > 12
    for command in commands:
        parse([f"learner.{word}" for word in command.split()])


@pytest.mark.parametrize("choices", [LOSSES, NORMALIZERS, CORRECTIONS, PROXIMALS, MASKS])
def test_every_choice_of_the_loss_is_a_row_of_the_corrections(choices):
    text = (ROOT / "docs" / "corrections.md").read_text()
    assert set(choices) <= set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_the_layout_of_the_readme_names_every_package():
    packages = {f.parent.name for f in (ROOT / "treepo_async").glob("*/__init__.py")}
    assert packages == set(re.findall(r"^  (\w+)/ ", README, re.MULTILINE))


class _Anything(dict):
    """An event that has every field."""

    def __missing__(self, name):
        return 1


def _record():
    seconds = dict.fromkeys(("wait_batch", "train", "ack", "publish", "other", "wall"), 1.0)
    recorder = Recorder()
    recorder.tree(_Anything(outcome="accepted"))
    recorder.engine(_Anything())
    steps = recorder.step(_Anything(seconds=seconds, replay={"trained": 1}), _Anything())
    return {**steps, **EVAL_NAMES}
