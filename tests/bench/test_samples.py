from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bench.made import CELL, INDEPENDENT, TREE
from treepo_async.bench.cells import Arm, Stop
from treepo_async.bench.samples import Sample, append, read
from treepo_async.errors import DataError

COUNTS = st.integers(1, 10**9)


def test_figures_follow_from_the_counts():
    assert TREE.computed_tokens == 40
    assert TREE.decoded_per_delivered == 0.5
    assert TREE.mean_delivered_tokens == 30
    assert TREE.trajectories_per_s == 4
    assert TREE.tokens_per_s == (240 + 8 * 10) / 2
    assert TREE.processed_tokens_per_s == (120 + 40) / 2
    assert TREE.decoded_tokens_per_s == 60
    assert TREE.child_cached_share == 0.95
    assert INDEPENDENT.child_cached_share is None


@settings(deadline=None)
@given(
    stop=st.sampled_from(Stop),
    arm=st.sampled_from(Arm),
    counts=st.lists(COUNTS, min_size=8, max_size=8),
    wall_s=st.floats(1e-3, 1e6),
)
def test_what_is_read_is_what_was_written(tmp_path_factory, stop, arm, counts, wall_s):
    file = tmp_path_factory.mktemp("out") / "samples.csv"
    names = [n for n in Sample.__slots__ if n.endswith(("tokens", "requests"))]
    odd = replace(
        TREE,
        cell=replace(CELL, stop=stop),
        arm=arm,
        wall_s=wall_s,
        **dict(zip(names, counts, strict=False)),
    )
    append(file, [TREE, INDEPENDENT])
    append(file, [odd])
    assert read(file) == [TREE, INDEPENDENT, odd]


def test_without_a_file_there_is_nothing(tmp_path):
    assert read(tmp_path / "samples.csv") == []


def test_the_reader_of_the_file_finds_the_figures_too(tmp_path):
    file = tmp_path / "samples.csv"
    append(file, [TREE])
    header, row = file.read_text().splitlines()
    found = dict(zip(header.split(","), row.split(","), strict=True))
    assert (found["arm"], found["stop"], found["decoded_per_delivered"]) == (
        "tree",
        "natural",
        "0.5",
    )


@pytest.mark.parametrize("num_lost", [1, 60, 150])
def test_a_line_that_was_cut_off_is_named(num_lost, tmp_path):
    file = tmp_path / "samples.csv"
    append(file, [TREE, INDEPENDENT])
    file.write_text(file.read_text()[:-num_lost])
    with pytest.raises(DataError, match=r"samples\.csv line 3 was cut off; remove it"):
        read(file)


@pytest.mark.parametrize("content", ["depth,segment\n7,16\n", "1,2,3\n4,5,6\n"])
def test_a_file_of_something_else_is_named(content, tmp_path):
    file = tmp_path / "samples.csv"
    file.write_text(content)
    with pytest.raises(DataError, match=r"samples\.csv line 2 is no sample .*; remove it"):
        read(file)
