"""Placement against brute force on small clusters, and the choices that a person would make."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.cluster.placement import Demand, Node, Placement, parse_nodes, place
from treepo_async.cluster.placement_text import coordinates, describe
from treepo_async.config.layout import Layout
from treepo_async.errors import ConfigError

SMALL = st.integers(1, 4)
LAYOUTS = st.builds(Layout, tp=st.sampled_from([1, 2, 3, 4]), pp=st.integers(1, 3), dp=st.integers(1, 3))  # fmt: skip
DEMANDS = st.builds(Demand, LAYOUTS, st.integers(0, 5), SMALL, st.integers(0, 6))
GPUS = st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any)


def nodes_with(gpus, cpus=0):
    return [Node(f"n{i}", f"n{i}", cpus, number, all_gpus=number) for i, number in enumerate(gpus)]


def demand(layout, *, engines=1, tp=1, actors=2):
    return Demand(Layout.parse(layout), engines, tp, actors)


def placed(text, wanted) -> Placement:
    return place(wanted, parse_nodes(text))


def is_possible(wanted, slots):
    """Whether any way to deal blocks of ranks to nodes leaves room for the engines."""
    layout = wanted.layout
    choices = [range(free // layout.tp + 1) for free in slots]
    return any(
        sum(blocks) == layout.pp * layout.dp
        and sum(
            (free - taken * layout.tp) // wanted.engine_tp
            for free, taken in zip(slots, blocks, strict=True)
        )
        >= wanted.engines
        for blocks in product(*choices)
    )


def fewest_cuts(wanted, slots):
    """Of pipelines between nodes, over all ways that leave room for the engines."""
    layout, found = wanted.layout, []
    for blocks in product(*[range(free // layout.tp + 1) for free in slots]):
        left = [free - taken * layout.tp for free, taken in zip(slots, blocks, strict=True)]
        if sum(blocks) != layout.pp * layout.dp:
            continue
        if sum(free // wanted.engine_tp for free in left) < wanted.engines:
            continue
        ends = [sum(blocks[: i + 1]) for i, taken in enumerate(blocks) if taken]
        found.append(sum(end % layout.pp > 0 for end in ends))
    return min(found)


@given(DEMANDS, GPUS)
def test_a_demand_is_placed_exactly_where_brute_force_finds_room(wanted, gpus):
    try:
        place(wanted, nodes_with(gpus))
        was_placed = True
    except ConfigError:
        was_placed = False
    assert was_placed == is_possible(wanted, gpus)


@given(DEMANDS, GPUS)
def test_no_gpu_is_given_twice_and_every_role_has_its_own(wanted, gpus):
    if not is_possible(wanted, gpus):
        return
    found = place(wanted, nodes_with(gpus))
    taken = [(s.node, gpu) for s in (*found.learner, *found.engines) for gpu in s.gpus]
    assert len(taken) == len(set(taken)) == wanted.layout.world_size + wanted.engine_slots
    assert all(gpu < gpus[node] for node, gpu in taken)
    assert len(found.engines) == wanted.engines
    assert all(len(seat.gpus) == wanted.engine_tp for seat in found.engines)
    assert len(found.actors) == wanted.actors


@given(DEMANDS, GPUS)
def test_ranks_follow_each_other_tensor_groups_stay_whole_and_pipelines_are_cut_least(wanted, gpus):
    if not is_possible(wanted, gpus):
        return
    shares = place(wanted, nodes_with(gpus)).learner
    ranks = [r for s in shares for r in range(s.first_rank, s.first_rank + s.num_ranks)]
    assert ranks == list(range(wanted.layout.world_size))
    assert all(len(s.gpus) == s.num_ranks and s.num_ranks % wanted.layout.tp == 0 for s in shares)
    ends = [(s.first_rank + s.num_ranks) // wanted.layout.tp for s in shares]
    assert sum(end % wanted.layout.pp > 0 for end in ends) == fewest_cuts(wanted, gpus)


@given(DEMANDS, GPUS)
def test_actors_are_spread_and_replay_is_beside_rank_0(wanted, gpus):
    if not is_possible(wanted, gpus):
        return
    found = place(wanted, nodes_with(gpus))
    counts = [found.actors.count(node) for node in range(len(gpus))]
    assert max(counts) - min(counts) <= 1
    assert found.replay == found.learner[0].node


def test_the_learner_is_on_the_first_node_and_engines_are_spread_over_the_others():
    found = placed("4x8", demand("tp4pp2", engines=6, tp=2, actors=8))
    assert [(share.node, share.num_ranks) for share in found.learner] == [(0, 8)]
    assert [seat.node for seat in found.engines] == [1, 2, 3, 1, 2, 3]
    assert [seat.gpus for seat in found.engines[::3]] == [(0, 1), (2, 3)]
    assert found.actors == (1, 2, 3, 0, 2, 3, 1, 0)


def test_a_pipeline_stays_on_one_node_where_two_would_be_filled_more():
    found = placed("3x3", demand("pp2dp2"))
    assert [(share.node, share.first_rank, share.num_ranks) for share in found.learner] == [
        (0, 0, 2),
        (1, 2, 2),
    ]


def test_a_learner_that_would_leave_no_room_for_an_engine_goes_elsewhere():
    found = placed("1x4,1x2", demand("pp2", tp=4))
    assert found.learner[0].node == 1
    assert found.engines[0] == found.engines[0].__class__(0, (0, 1, 2, 3))


def test_without_gpus_a_rank_and_an_engine_take_a_cpu_each():
    found = placed("2x0x5", demand("tp4pp2", engines=2))
    assert [share.num_ranks for share in found.learner] == [4, 4]
    assert [seat.node for seat in found.engines] == [0, 1]
    assert not found.on_gpus
    assert {share.gpus for share in found.learner} == {()}


def test_one_gpu_is_shared_and_ranks_never_share_one():
    found = placed("1x1", demand("tp1"))
    assert found.is_shared
    assert (found.learner[0].gpus, found.engines[0].gpus) == ((0,), (0,))
    with pytest.raises(ConfigError, match=r"learner=dp2 needs 2 GPUs .* room for 1"):
        placed("1x1", demand("dp2"))


@pytest.mark.parametrize("free", [0, 1])
def test_gpus_that_others_hold_are_neither_shared_nor_replaced_by_cpus(free):
    node = Node("n0", "n0", cpus=64, gpus=free, all_gpus=2)
    with pytest.raises(ConfigError, match=r"2 GPUs|1 GPUs"):
        place(demand("tp1"), [node])


def test_an_engine_is_split_over_gpus_alone():
    with pytest.raises(ConfigError, match=r"engine\.tp=2 splits an engine over GPUs"):
        placed("2x0x16", demand("tp1", tp=2))
    assert placed("2x0x16", demand("tp1", engines=0, tp=2)).engines == ()


def test_several_nodes_are_never_shared():
    with pytest.raises(ConfigError, match=r"engines=2 engine\.tp=1 need 2 GPUs"):
        placed("2x1", demand("tp1", engines=2))


def test_engines_that_run_elsewhere_take_no_place():
    found = placed("1x4", demand("tp4", engines=2, tp=0))
    assert [seat.gpus for seat in found.engines] == [(), ()]
    assert not found.is_shared


@pytest.mark.parametrize(
    ("nodes", "wanted", "says"),
    [
        (
            "4x8",
            demand("tp16"),
            "tp16 needs 16 GPUs in one node, the largest of 4 nodes has 8; lower tp",
        ),
        (
            "4x8",
            demand("tp4pp2", engines=20, tp=2),
            "need 40 GPUs, each engine in one node; 24 are left of 32 on 4 nodes after the learner's 8 (tp4pp2), "
            "with room for 12; lower engines to 12",
        ),
        (
            "2x8",
            demand("tp8pp2dp2"),
            "needs 32 GPUs as 4 groups of tp8, each in one node; 2 nodes with 16 GPUs have room for 2",
        ),
        ("2x8", demand("tp8", tp=16), "with room for 0; lower engine.tp"),
    ],
)
def test_what_has_no_room_is_refused_with_the_numbers_and_the_way_out(nodes, wanted, says):
    with pytest.raises(ConfigError) as caught:
        placed(nodes, wanted)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "4", "4x", "x8", "4x8x1x1", "4 x8", "axb", "2x8,,1x4", "-1x8"]
)
def test_nodes_that_are_written_in_another_way_are_refused_with_examples(text):
    with pytest.raises(ConfigError, match=r"e\.g\. 4x8"):
        parse_nodes(text)


def test_nodes_without_gpus_need_their_cpus():
    with pytest.raises(ConfigError, match="has no GPUs; say how many CPUs"):
        parse_nodes("2x0")
    assert [(node.gpus, node.cpus) for node in parse_nodes("1x0x16,1x8")] == [(0, 16), (8, 0)]


def test_a_cluster_without_nodes_is_refused():
    with pytest.raises(ConfigError, match="no living node"):
        place(demand("tp1"), [])


def test_ranks_are_numbered_by_tensor_then_pipeline_then_data_parallel():
    layout = Layout(tp=2, pp=2, dp=2)
    found = [coordinates(layout, rank) for rank in range(8)]
    assert found[:3] == [(0, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert found[4] == (0, 0, 1)
    assert len(set(found)) == 8


def test_the_table_names_every_rank_group_engine_and_who_must_be_reachable():
    wanted = demand("tp4pp2", engines=2, tp=2, actors=3)
    lines = describe(placed("1x4,1x8", wanted), wanted).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "nodes 2 with 12 GPUs: 8 for the learner (tp4pp2), 4 for 2 engines, 0 free",
        "node-0 GPU 0-1 engine-0 (tp2)",
        "GPU 2-3 engine-1 (tp2)",
        "CPU 2 actors: 0, 2",
        "node-1 GPU 0-3 rank 0-3 tp 0-3 stage 0 of 2",
        "GPU 4-7 rank 4-7 tp 0-3 stage 1 of 2",
        "CPU replay-0",
        "CPU 1 actor: 1",
        "reach node-1 from every node: replay (ZeroMQ with CURVE), free port from 10000 on",
        "node-0 from every actor: SGLang (HTTP with a key) and gate (ZeroMQ with CURVE), two ports an engine",
        "needs cluster.keys_dir, and run_dir, model and data under the same path on every node",
    ]
