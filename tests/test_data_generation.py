"""The page on data generation says what is there: keys on command lines, fields of the files."""

import re
import shlex
from pathlib import Path

import msgspec
import pytest

from treepo_async.config.command_line import parse, parse_generation
from treepo_async.wire.forms import TrajectoryLine
from treepo_async.wire.tree_line import SegmentLine, TreeLine

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data_generation.md").read_text()
COMMANDS = re.findall(r"^\.venv/bin/python launch/(actor|run)\.py (.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("program", "words"), COMMANDS, ids=[words for _, words in COMMANDS])
def test_a_command_of_the_page_has_keys_and_values_that_are_accepted(program, words):
    (parse_generation if program == "actor" else parse)(shlex.split(words))


def test_the_page_has_commands_of_both_programs():
    assert {program for program, _ in COMMANDS} == {"actor", "run"}


def test_the_page_names_every_field_of_the_files_and_no_other():
    trees, trajectories = PAGE.split("**`out_form=")[1:]
    tables = [
        re.findall(r"`([.\w]+)`", " ".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE)))
        for text in (trees, trajectories)
    ]
    segment = {f".{f.name}" for f in msgspec.structs.fields(SegmentLine)}
    assert set(tables[0]) == {f.name for f in msgspec.structs.fields(TreeLine)} | segment
    assert set(tables[1]) == {f.name for f in msgspec.structs.fields(TrajectoryLine)}
