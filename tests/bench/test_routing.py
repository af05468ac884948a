import pytest

from treepo_async.bench import routing_report
from treepo_async.bench.routing_cells import (
    MAX_WIDTH,
    MIN_WIDTH,
    NUM_UPDATES,
    PolicyName,
    RoutingCell,
    Update,
    parse,
    policy_of,
    shapes_of,
)
from treepo_async.bench.routing_report import RoutingSample
from treepo_async.bench.rows import read_rows
from treepo_async.engine.routing import Choice, Move, Reading, Work
from treepo_async.errors import ConfigError
from treepo_async.types import Provenance

WORK = Work(16, 160)
READINGS = [Reading(False, True, 0.0, 0.0, 0.0)] * 2
OUT = READINGS[0]._replace(is_out=True)


def test_every_way_is_measured_in_every_round():
    cells = parse(["rounds=2", "policies=prefix,random", "updates=drain"]).cells
    assert [tuple(map(str, cell)) for cell in cells] == [
        ("prefix", "drain", "1"),
        ("random", "drain", "1"),
        ("prefix", "drain", "2"),
        ("random", "drain", "2"),
    ]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("actors=0", "actors=0 must be a whole number from 1"),
        ("policies=best", "policies=best: .* some of prefix,random,round_robin"),
        ("updates=in_place", "updates=in_place: .* some of none,drain,retract"),
        ("tree=3", "unknown key tree; did you mean trees"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(word, named):
    with pytest.raises(ConfigError, match=named):
        parse([word])


def test_trees_are_uneven_with_a_heavy_tail_and_the_same_for_a_seed():
    shapes = shapes_of(200, 1)
    assert shapes == shapes_of(200, 1)
    assert shapes[:50] == shapes_of(50, 1)
    widths = sorted(shape.width for shape in shapes)
    assert widths[0] == MIN_WIDTH
    assert widths[-1] == MAX_WIDTH
    assert widths[100] < 2 * MIN_WIDTH


def test_controls_ask_neither_for_load_nor_for_prefix_and_avoid_only_what_is_out():
    turns = policy_of(PolicyName.ROUND_ROBIN, 0)
    assert [turns(READINGS, 0, WORK) for _ in range(3)] == [
        Choice(0, Move.HOME),
        Choice(1, Move.SPILLED),
        Choice(0, Move.HOME),
    ]
    assert turns(READINGS, None, WORK) == Choice(1, Move.HOME), "a tree that begins moves nothing"
    drawn = policy_of(PolicyName.RANDOM, 0)
    engines = [drawn(READINGS, 0, WORK).engine for _ in range(200)]
    assert 60 < sum(engines) < 140
    assert drawn([OUT, READINGS[0]], 0, WORK) == Choice(1, Move.SPILLED)
    assert drawn([OUT, OUT], 0, WORK) is None


def sample(policy=PolicyName.PREFIX, number=1, decoded=(300, 100), **costs):
    cost = Provenance(
        "l",
        "a",
        **{
            "decoded_tokens": 200,
            "prefix_tokens": 1000,
            "cached_tokens": 900,
            "num_children": 10,
            "num_spilled": 1,
            "num_migrated": 1,
            "moved_tokens": 40,
            "refilled_tokens": 60,
        }
        | costs,
    )
    return RoutingSample.of(
        RoutingCell(policy, Update.DRAIN, number), [cost, cost], decoded, wall_s=2.0
    )


def test_a_sample_adds_up_its_trees_and_comes_back_from_its_file(tmp_path):
    found = sample()
    assert (found.at_home, found.cached, found.tokens_per_s) == (0.8, 0.9, 200.0)
    assert found.load_max_over_mean == 1.5
    assert found.refilled_per_update == 120 / NUM_UPDATES
    routing_report.append(tmp_path / "samples.csv", [found])
    (row,) = read_rows(tmp_path / "samples.csv", dict.fromkeys(routing_report.COLUMNS, str))
    assert (row["policy"], row["spilled"], row["moved_tokens"]) == ("prefix", "2", "80")


def test_the_table_has_medians_of_rounds_and_the_worst_balance():
    samples = [
        sample(number=1),
        sample(number=2, decoded=(200, 200), num_spilled=0),
        sample(number=3, decoded=(220, 180), num_spilled=0),
        sample(PolicyName.RANDOM),
    ]
    _, _, prefix, random = routing_report.table(samples).splitlines()
    assert prefix.startswith("| drain | prefix | 90.0% | 1.10 (1.50) | 90.0% | 80 | 40 |")
    assert random.startswith("| drain | random | 80.0% | 1.50 (1.50) |")
