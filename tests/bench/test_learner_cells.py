from pathlib import Path

import pytest

from treepo_async.bench.learner_cells import Branching, LearnerCell, parse
from treepo_async.errors import ConfigError


def test_without_words_every_branching_is_measured_at_three_widths():
    options = parse([])
    assert [(cell.branching, cell.width) for cell in options.cells] == [
        (branching, width)
        for branching in (Branching.EARLY, Branching.SPREAD, Branching.LATE, Branching.TREEPO)
        for width in (8, 16, 64)
    ]
    assert options.cells[0] == LearnerCell(
        "cpu", "float32", "auto", "none", 4096, 1, "", Branching.EARLY, 8, 7, 32, 32
    )
    assert (options.rounds, options.out) == (5, Path("runs/bench-learner"))


def test_lists_are_combined_with_the_first_key_slowest_and_each_point_once():
    cells = parse(["branching=late", "width=8,4,8", "segment=16,32", "prompts=3"]).cells
    assert [(cell.width, cell.segment) for cell in cells] == [(8, 16), (8, 32), (4, 16), (4, 32)]
    assert {(cell.branching, cell.prompts) for cell in cells} == {(Branching.LATE, 3)}


def test_trees_of_a_file_are_one_cell_without_sizes():
    (cell,) = parse(["trees=a/trees.jsonl", "prompts=4", "budget=100"]).cells
    assert (cell.trees, cell.branching, cell.width) == ("a/trees.jsonl", Branching.FILE, 0)
    assert (cell.prompts, cell.budget, str(cell)) == (4, 100, "a/trees.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["widht=7"], "widht=7: unknown key widht; did you mean width?"),
        (["xyz=7"], "xyz=7: unknown key xyz; the keys are shape, dtype,"),
        (["depth="], "depth=: depth has no value, write e.g. depth=7"),
        (["trees="], "trees=: trees has no value, write e.g. trees=FILE"),
        (["width=0"], "width='0' is not a whole number from 1, or several with commas, e.g."),
        (["budget=4,5"], "budget='4,5' is not a whole number from 1, e.g. budget=4096"),
        (["dtype=half"], "dtype=half is unknown; it is one of float32, bfloat16"),
        (["attention=flash"], "attention=flash is unknown; it is one of auto, dense,"),
        (
            ["branching=bushy"],
            "branching=bushy is unknown; it is one of early, spread, late, treepo",
        ),
        (["branching=file"], "branching=file is unknown"),
        (["width=256"], "depth=7 is too shallow for width=256: two paths a fork make 128"),
        (["width=12"], "width=12 is no power of 2, which branching=early needs"),
        (["trees=a.jsonl", "width=8"], "width=8 is of trees that are made"),
    ],
)
def test_a_word_that_cannot_be_measured_is_named_with_the_way_out(words, message):
    with pytest.raises(ConfigError) as caught:
        parse(words)
    assert message in str(caught.value)


def test_any_width_does_where_paths_end_on_their_own():
    (cell,) = parse(["branching=treepo", "width=12"]).cells
    assert cell.width == 12
