import csv
from dataclasses import replace

import pytest

from treepo_async.bench import learner_samples as samples
from treepo_async.bench.learner_cells import Way, parse
from treepo_async.bench.learner_report import (
    cell_line,
    cells_of,
    round_line,
    table,
    write_cells,
    write_table,
)
from treepo_async.bench.learner_samples import LearnerSample, Origin
from treepo_async.errors import DataError

(CELL,) = parse(["branching=late", "width=8"]).cells
(OTHER,) = parse(["branching=early", "width=8"]).cells
ORIGIN = Origin("c0de", "cpu")


def sample(way, number=1, wall_s=1.0, cell=CELL, **changes):
    tree = way is Way.TREE
    found = LearnerSample(
        cell=cell,
        code=ORIGIN.code,
        device=ORIGIN.device,
        way=way,
        round=number,
        place=1 if tree else 2,
        trajectories=8,
        tokens=1000 if tree else 3000,
        trained=900 if tree else 2700,
        pieces=1 if tree else 8,
        microbatches=1,
        flops=110.0 if tree else 300.0,
        whole_flops=100.0,
        expected_s=2.0 if tree else 5.0,
        choice="tree",
        wall_s=wall_s,
        cpu_s=wall_s / 2,
        peak_bytes=2**20 if tree else 3 * 2**20,
        gradient_norm=1.0,
        gradient_gap=0.25 if tree else 0.0,
    )
    return replace(found, **changes)


def three_rounds():
    """Flat over tree of 2, 4 and 3."""
    times = ((1.0, 2.0), (2.0, 8.0), (1.0, 3.0))
    return [
        one
        for number, (tree, flat) in enumerate(times, start=1)
        for one in (sample(Way.TREE, number, tree), sample(Way.FLAT, number, flat))
    ]


def test_what_was_appended_is_read(tmp_path):
    file = tmp_path / "samples.csv"
    assert samples.read(file) == []
    samples.append(file, three_rounds()[:2])
    samples.append(file, three_rounds()[2:])
    assert samples.read(file) == three_rounds()


def test_samples_of_other_code_or_another_device_are_not_counted():
    mine = sample(Way.TREE)
    others = [replace(mine, code="0ther"), replace(mine, device="NVIDIA H100")]
    assert ORIGIN.of([others[0], mine, others[1]]) == [mine]


def cut_off(text):
    return text[:-5]


def misspelt(text):
    return text.replace("late", "later", 1)


@pytest.mark.parametrize(("damage", "line"), [(cut_off, 7), (misspelt, 2)])
def test_a_damaged_line_is_named(tmp_path, damage, line):
    file = tmp_path / "samples.csv"
    samples.append(file, three_rounds())
    file.write_text(damage(file.read_text()))
    with pytest.raises(
        DataError, match=rf"samples\.csv line {line} .*; remove it, or take another"
    ):
        samples.read(file)


def test_time_ratios_are_medians_of_the_rounds_and_not_ratios_of_medians():
    (summary,) = cells_of(three_rounds())
    ratio = summary.ratio(Way.FLAT, Way.TREE)
    assert (ratio.median, ratio.low, ratio.high) == (3.0, 2.0, 4.0)
    assert summary.flop_ratio == 3.0, "of whole trees, not of what was computed"
    assert summary.share_of_flop_ratio == 1.0
    assert summary.token_ratio == 3.0
    assert summary.expected_ratio == 2.5
    assert summary.gradient_gap == 0.25


def test_cells_are_summed_up_apart():
    others = [sample(Way.TREE, cell=OTHER), sample(Way.FLAT, wall_s=1.5, cell=OTHER)]
    first, second = cells_of([*three_rounds(), *others])
    assert (first.cell, len(first.rounds)) == (CELL, 3)
    assert (second.cell, second.ratio(Way.FLAT, Way.TREE).median) == (OTHER, 1.5)


def test_the_lines_name_the_ratio_and_what_the_cost_model_takes():
    (summary,) = cells_of(three_rounds())
    assert round_line(summary.rounds[1]) == "  round 2  tree 2.000 s  flat 8.000 s  flat/tree 4.00"
    assert "flat/tree 3.00 (2.00 - 4.00) of 3.00 by FLOPs: 100%" in cell_line(summary)
    assert "takes tree: 0.33 of flat's time" in cell_line(summary)


def test_where_the_cost_model_takes_flat_its_time_is_that_of_flat():
    rounds = [replace(one, choice="flat") for one in three_rounds()]
    assert "takes flat: 1.00 of flat's time" in cell_line(cells_of(rounds)[0])


def test_files_have_a_row_a_cell(tmp_path):
    padded = [sample(Way.PADDED, number, 6.0) for number in (1, 2, 3)]
    summaries = cells_of([*three_rounds(), *padded])
    write_cells(tmp_path / "cells.csv", summaries)
    with (tmp_path / "cells.csv").open() as stream:
        (row,) = csv.DictReader(stream)
    assert (row["branching"], row["time_ratio"], row["padded_time_ratio"]) == ("late", "3.0", "6.0")
    write_table(tmp_path / "table.md", summaries)
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("cpu, float32, auto attention, recompute=none, 1 trees, microbatches of")
    assert "| **3.00** (2.00 - 4.00) | 3.00 | 100% | 2.50 | 6.00 |" in text
    assert "| 3 / 1 | tree | 0.33 |" in text


def test_without_padding_the_table_says_so():
    assert "| as flat |" in table(cells_of(three_rounds()))
