import numpy as np
import pytest

from tests.oracle import random_tree
from tests.wire.test_codec import assert_same
from treepo_async.errors import ConfigError, DataError
from treepo_async.wire.forms import FORMS
from treepo_async.wire.tables import write_table
from treepo_async.wire.tree_file import TreeFile

VOCAB_SIZE = 128


def trees_of(number):
    rng = np.random.default_rng(4)
    return [random_tree(rng, vocab_size=VOCAB_SIZE, nan_share=0.2) for _ in range(number)]


def write(path, trees, form="trees"):
    lines_file = path.with_suffix(".jsonl")
    lines = [line for tree in trees for line in FORMS[form].encode(tree, str)]
    lines_file.write_bytes(b"".join(line + b"\n" for line in lines))
    if path.suffix == ".parquet":
        write_table(lines_file, path, FORMS[form])
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trees_are_read_by_number_in_any_order(tmp_path, suffix):
    trees = trees_of(5)
    file = TreeFile(write(tmp_path / f"trees{suffix}", trees), vocab_size=VOCAB_SIZE)
    assert len(file) == 5
    for index in (4, 0, 2, 2):
        assert_same(file.tree(index), trees[index])


def test_empty_lines_are_no_trees_and_the_last_line_needs_no_end(tmp_path):
    path = write(tmp_path / "trees.jsonl", trees_of(2))
    path.write_bytes(b"\n" + path.read_bytes().replace(b"\n", b"\n\n").rstrip())
    assert len(TreeFile(path)) == 2
    TreeFile(path).tree(1)


def test_a_damaged_tree_is_named_with_its_file_and_number_and_the_others_are_read(tmp_path):
    path = write(tmp_path / "trees.jsonl", trees_of(3))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[1][:-9], lines[2]]) + b"\n")
    file = TreeFile(path)
    with pytest.raises(DataError, match=r"trees\.jsonl entry 2: tree line"):
        file.tree(1)
    file.tree(2)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_tokens_of_another_model_are_refused(tmp_path, suffix):
    file = TreeFile(write(tmp_path / f"trees{suffix}", trees_of(1)), vocab_size=16)
    with pytest.raises(DataError, match=r"entry 1: .* has a value outside 0\.\.15"):
        file.tree(0)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_trajectories_are_no_trees_and_the_way_out_is_named(tmp_path, suffix):
    file = TreeFile(write(tmp_path / f"flat{suffix}", trees_of(1), "trajectories"))
    with pytest.raises(DataError, match=r"holds a trajectory, not a tree; .* out_form=trees"):
        file.tree(0)


@pytest.mark.parametrize(
    ("name", "content", "error", "reason"),
    [
        ("gone.jsonl", None, ConfigError, "does not exist"),
        ("trees.txt", b"", ConfigError, r"must be a \.jsonl or \.parquet"),
        ("trees.jsonl", b"", DataError, "has no tree"),
        ("trees.parquet", b"PAR1", DataError, "is not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name, content, error, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=rf"{name}.*{reason}"):
        TreeFile(tmp_path / name)
