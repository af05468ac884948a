from dataclasses import replace

import pytest

from tests.bench.made import CELL, pair
from treepo_async.bench.paper import HEADER, NOTES, SHAPES, beside
from treepo_async.bench.summary import summarize

SAME = replace(CELL, depth=28, segment=250, width=64, branch=2)


def of(cell, independent_s=3.0):
    return summarize([tuple(replace(s, cell=cell) for s in pair(1, 2.0, independent_s))])


def rows(*summaries):
    return [dict(zip(HEADER, row, strict=True)) for row in beside(summaries)]


def test_without_a_shape_of_ours_the_papers_stand_with_their_closed_form_and_dashes():
    found = rows()
    assert [row["paper: depth x segment"] for row in found] == [
        "7 x 1000",
        "14 x 500",
        "28 x 250",
        "56 x 125",
    ]
    # decoded over delivered tokens at width 64, first fork 2: .424, .712, .856, .928
    assert [row["limit"] for row in found] == ["2.36", "1.40", "1.17", "1.08"]
    assert {row["gain in trajectories/s, ours / paper"] for row in found} == {"-"}


def test_ours_of_the_same_shape_stands_beside_the_papers_with_the_ratio_of_both():
    row = rows(of(SAME))[2]
    assert (row["its gain in trajectories/s"], row["its gain in tokens/s"]) == ("2.00", "1.30")
    assert row["our gain in trajectories/s"] == "1.50"
    # (240 + 8 * 10) / 2 over (200 + 8 * 10) / 3
    assert row["our gain in tokens/s"] == "1.71"
    assert row["gain in trajectories/s, ours / paper"] == "0.75"
    assert row["ours: depth x segment"] == "28 x 250 (2 layers x 64, prompt 10, stop=natural)"


def test_shorter_segments_of_the_same_shape_count_and_each_cell_has_a_row():
    found = rows(of(replace(SAME, depth=7, segment=16)), of(replace(SAME, depth=7, segment=64)))
    assert [row["ours: depth x segment"].partition(" (")[0] for row in found[:2]] == [
        "7 x 16",
        "7 x 64",
    ]
    assert len(found) == len(SHAPES) + 1


@pytest.mark.parametrize("other", [{"depth": 12}, {"width": 16}, {"branch": 4}])
def test_another_shape_is_none_of_the_papers(other):
    assert rows(of(replace(SAME, **other))) == rows()


def test_the_notes_say_what_the_figures_of_the_paper_are():
    assert "1.40 for trajectories/s and 1.30 for tokens/s" in NOTES
