from pathlib import Path

import pytest

from treepo_async.bench.cells import Cell, Stop
from treepo_async.bench.command import parse
from treepo_async.errors import ConfigError


def test_without_words_the_two_widths_of_the_paper_are_measured():
    options = parse([])
    assert options.cells == tuple(
        Cell(7, 16, width, 2, 256, 8, 8, 512, 64, Stop.NONE) for width in (16, 64)
    )
    assert (options.pairs, options.out) == (5, Path("runs/bench-sampling"))


def test_lists_are_combined_with_the_first_key_slowest_and_each_point_once():
    cells = parse(["depth=7,14", "width=8,16,8", "prompt=32", "stop=natural"]).cells
    assert [(cell.depth, cell.width) for cell in cells] == [(7, 8), (7, 16), (14, 8), (14, 16)]
    assert all(cell.prompt == 32 and cell.stop is Stop.NATURAL for cell in cells)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("depht=7", "depht=7: unknown key depht; did you mean depth?"),
        ("xyz=7", "xyz=7: unknown key xyz; the keys are depth, segment,"),
        ("depth", "depth: depth has no value, write e.g. depth=7"),
        ("depth=", "depth=: depth has no value"),
        ("width=16;64", "width='16;64' is not a whole number from 1, or several with commas, e.g."),
        ("width=16,", "width='' is not a whole number"),
        ("width=-4", "width='-4' is not a whole number"),
        ("segment=0", "segment='0' is not a whole number"),
        ("prompts=2,4", "prompts='2,4' is not a whole number from 1, e.g. prompts=8"),
        ("stop=eos", "stop='eos' is unknown; it is one of none, natural"),
        ("branch=1", "branch=1 forks nothing"),
        ("branch=32", "branch=32 is more than width=16"),
        ("hidden=100", "hidden=100 is not a multiple of 64"),
        ("prompt=17000", "are 17112 tokens; the model takes 16384"),
        (
            "depth=5",
            "depth=5 is too shallow for width=64: with branch=2 a tree has 32 trajectories",
        ),
    ],
)
def test_a_word_that_cannot_be_measured_is_named_with_the_way_out(word, message):
    with pytest.raises(ConfigError) as caught:
        parse([word])
    assert message in str(caught.value)
