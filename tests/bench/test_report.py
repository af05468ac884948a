import csv
from dataclasses import replace

from tests.bench.made import CELL, pair
from treepo_async.bench import paper, plot, report
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


def rows_under(heading, text):
    """The cells of each row of the first table behind a line, by column."""
    lines = text.partition(heading)[2].strip().splitlines()
    header, _, *rows = (line[2:-2].split(" | ") for line in lines[: [*lines, ""].index("")])
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_the_table_tells_of_both_arms_what_was_decoded_computed_and_served_and_how_fast(tmp_path):
    report.write_table(tmp_path / "table.md", [SUMMARY])
    text = (tmp_path / "table.md").read_text()
    (speed,) = rows_under(f"{report.setup(CELL)}:", text)
    assert speed["**speed-up**"] == "**1.50** (1.00 - 2.00)"
    assert speed["trajectories/s"] == "4.0 / 2.7"
    # medians of wall times are 2 and 3 s: (240 + 8 * 10) / 2, (200 + 8 * 10) / 3
    assert speed["tokens/s"] == "160 / 93"
    # (120 + 40) / 2, (200 + 8) / 3
    assert speed["without cached prefix"] == "80 / 69"
    assert speed["mean length"] == "30 / 25"
    (work,) = rows_under("What it took:", text)
    assert work["wall time, s"] == "2.00 / 3.00"
    assert work["decoded tokens"] == "120 / 200"
    assert work["delivered tokens"] == "240 / 200"
    assert work["prefix tokens computed"] == "40 / 8"
    assert work["prefix tokens from the cache"] == "260 / 72"


def test_each_set_up_has_tables_of_its_own_and_the_paper_stands_once(tmp_path):
    other = replace(CELL, layers=4)
    summaries = [SUMMARY, summarize([tuple(replace(s, cell=other) for s in pair(1, 2.0, 3.0))])]
    report.write_table(tmp_path / "table.md", summaries)
    text = (tmp_path / "table.md").read_text()
    for cell in (CELL, other):
        assert len(rows_under(f"{report.setup(cell)}:", text)) == 1
    assert text.count("What it took:") == 2
    assert text.count("paper: depth x segment") == 1
    assert text.rstrip().endswith(paper.NOTES)


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
