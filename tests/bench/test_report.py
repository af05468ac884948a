import csv

from tests.bench.made import CELL, pair
from treepo_async.bench import plot, report
from treepo_async.bench.summary import summarize

SUMMARY = summarize([pair(1, 2.0, 3.0), pair(2, 4.0, 4.0), pair(3, 1.0, 2.0)])


def test_a_pair_is_one_line_with_its_times_and_its_order():
    line = report.pair_line(*pair(4, 2.0, 3.0))
    assert line == (
        "  pair 4  tree 2.00 s  independent 3.00 s  speed-up 1.50 (by processor time 1.50)  decoded/delivered 0.500  "
        "children's prefix from the cache 95.0%  (tree first)"
    )


def test_a_cell_is_summed_up_in_one_line():
    assert "speed-up 1.50 (1.00 - 2.00) of a limit of 2.00: 75%" in report.cell_line(SUMMARY)


def test_the_table_has_a_row_for_each_cell_and_says_what_is_common(tmp_path):
    report.write_table(tmp_path / "table.md", [SUMMARY])
    text = (tmp_path / "table.md").read_text()
    assert text.startswith(f"{report.setup(CELL)}:\n\n| depth x segment | width |")
    assert (
        "| 4 x 8 | 4 | 2 | 10 | 3 | **1.50** (1.00 - 2.00) | 1.50 | 2.00 | 75% | 0.500 | 95.0% | 4.0 / 2.7 |"
    ) in text


def test_the_rows_of_cells_csv_name_every_figure(tmp_path):
    report.write_cells(tmp_path / "cells.csv", [SUMMARY])
    with (tmp_path / "cells.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["width"], row["stop"], row["pairs"]) == ("4", "natural", "3")
    assert (row["speed_up_median"], row["speed_up_low"], row["speed_up_high"]) == (
        "1.5",
        "1.0",
        "2.0",
    )
    assert (row["tree_wall_s_median"], row["independent_wall_s_high"]) == ("2.0", "4.0")
    assert row["share_of_limit"] == "0.75"


def test_the_picture_is_a_picture_of_any_sweep(tmp_path):
    plot.draw(tmp_path / "plot.png", [SUMMARY])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot.draw(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()
