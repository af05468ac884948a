import numpy as np
import pytest

from tests.oracle import random_tree
from treepo_async.errors import DataError, WireError
from treepo_async.wire import tables
from treepo_async.wire.forms import FORMS
from treepo_async.wire.tables import TableReader, read_lines, write_table


def lines_of(form, num_trees=7):
    rng = np.random.default_rng(2)
    trees = [random_tree(rng, num_segments=9, nan_share=0.3) for _ in range(num_trees)]
    return [line for tree in trees for line in form.encode(tree, lambda ids: str(list(ids)))]


def write(tmp_path, lines, form):
    source, table = tmp_path / "lines.jsonl", tmp_path / "out.parquet"
    source.write_bytes(b"".join(line + b"\n" for line in lines))
    write_table(source, table, form)
    return table


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rows_per_group", [2, 1000])
def test_lines_come_back_from_a_table_byte_for_byte(tmp_path, monkeypatch, name, rows_per_group):
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", rows_per_group)
    lines = lines_of(FORMS[name])
    table = write(tmp_path, lines, FORMS[name])
    assert list(read_lines(table, FORMS[name])) == lines
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


def test_columns_have_the_types_that_numbers_have(tmp_path):
    from pyarrow.parquet import read_schema

    schema = read_schema(write(tmp_path, lines_of(FORMS["trajectories"]), FORMS["trajectories"]))
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types["token_ids"] == "list<element: int32>"
    assert types["logprobs"] == "list<element: float>"
    assert (types["reward"], types["temperature"], types["stop"]) == ("float", "double", "string")


def test_rows_are_read_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 3)
    form = FORMS["trees"]
    reader = TableReader(write(tmp_path, lines_of(form), form))
    forward = [reader.row(i)["prompt_id"] for i in range(len(reader))]
    assert len(reader) == 7
    assert [reader.row(i)["prompt_id"] for i in (6, 0, 3)] == [forward[i] for i in (6, 0, 3)]


def test_a_table_of_no_lines_has_no_rows(tmp_path):
    form = FORMS["trees"]
    assert list(read_lines(write(tmp_path, [], form), form)) == []


def test_what_is_no_table_of_this_form_is_named(tmp_path):
    trees, trajectories = FORMS["trees"], FORMS["trajectories"]
    table = write(tmp_path, lines_of(trajectories), trajectories)
    with pytest.raises(DataError, match=r"out\.parquet row 1: .*accuracies|unknown field"):
        list(read_lines(table, trees))
    table.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match=r"out\.parquet is not a parquet file"):
        list(read_lines(table, trees))


def test_a_damaged_group_of_rows_is_told_and_the_others_are_read(tmp_path, monkeypatch):
    from pyarrow.parquet import ParquetFile

    monkeypatch.setattr(tables, "ROWS_PER_GROUP", 3)
    form = FORMS["trees"]
    table = write(tmp_path, lines_of(form), form)
    column = ParquetFile(table).metadata.row_group(1).column(1)
    content = bytearray(table.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    content[begin : begin + 40] = b"\xff" * 40
    table.write_bytes(content)
    reader = TableReader(table)
    for _ in range(2):
        with pytest.raises(WireError, match="table rows are damaged"):
            reader.row(3)
        assert reader.row(0)["prompt_id"] != reader.row(6)["prompt_id"]
    with pytest.raises(DataError, match=r"out\.parquet row 4: table rows are damaged"):
        list(read_lines(table, form))


def test_a_damaged_footer_is_told_at_opening(tmp_path):
    form = FORMS["trees"]
    table = write(tmp_path, lines_of(form), form)
    content = bytearray(table.read_bytes())
    size = int.from_bytes(content[-8:-4], "little")
    content[-8 - size : -8] = b"\xff" * size
    table.write_bytes(content)
    with pytest.raises(DataError, match=r"out\.parquet is not a parquet file"):
        TableReader(table)
