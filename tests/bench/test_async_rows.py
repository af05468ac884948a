from dataclasses import astuple
from math import isnan

import pytest

from tests.bench.made_async import cell
from treepo_async.bench.async_rows import read_cell, read_lags, write_cell, write_lags, write_rows
from treepo_async.errors import DataError


def test_a_cell_is_read_as_it_was_written(tmp_path):
    written = cell()
    write_cell(tmp_path / "cells" / "sync-seed0", written)
    found = read_cell(tmp_path / "cells" / "sync-seed0")
    assert [str(astuple(row)) for row in found.steps] == [
        str(astuple(row)) for row in written.steps
    ]
    assert found.ledger == written.ledger
    assert found.evals[0].accuracy == 0.75
    assert isnan(found.evals[0].greedy_accuracy)


def test_the_rows_of_all_cells_go_into_one_file_which_is_written_anew(tmp_path):
    for _ in range(2):
        write_rows(tmp_path, [cell(seed=0), cell(seed=1)])
    assert [row.seed for row in read_cell(tmp_path).steps] == [0] * 6 + [1] * 6


def test_a_row_that_was_cut_off_is_refused(tmp_path):
    write_rows(tmp_path, [cell()])
    file = tmp_path / "steps.csv"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(DataError, match="cut off"):
        read_cell(tmp_path)


def test_numbers_by_lag_are_read_as_they_were_written():
    assert write_lags([(8, 0.25), (0, 0.75)]) == "0=0.75 8=0.25"
    assert read_lags("0=0.75 8=0.25") == {0: 0.75, 8: 0.25}
    assert read_lags("") == {}
