"""Cells and samples made by hand."""

from dataclasses import replace

from treepo_async.bench.cells import Arm, Cell, Stop
from treepo_async.bench.samples import Sample

CELL = Cell(
    depth=4,
    segment=8,
    width=4,
    branch=2,
    prompt=10,
    prompts=2,
    layers=2,
    hidden=64,
    running=8,
    stop=Stop.NATURAL,
)
TREE = Sample(
    cell=CELL,
    arm=Arm.TREE,
    pair=1,
    place=1,
    trajectories=8,
    requests=14,
    decoded_tokens=120,
    delivered_tokens=240,
    prefix_tokens=300,
    cached_tokens=260,
    child_requests=10,
    child_servable_tokens=200,
    child_cached_tokens=190,
    wall_s=2.0,
    engine_cpu_s=1.6,
)
INDEPENDENT = replace(
    TREE,
    arm=Arm.INDEPENDENT,
    place=2,
    requests=8,
    decoded_tokens=200,
    delivered_tokens=200,
    prefix_tokens=80,
    cached_tokens=72,
    child_requests=0,
    child_servable_tokens=0,
    child_cached_tokens=0,
    wall_s=3.0,
    engine_cpu_s=2.4,
)


def pair(number, tree_s, independent_s, **tree):
    """Both arms of a pair, with their wall times."""
    return (
        replace(TREE, pair=number, wall_s=tree_s, **tree),
        replace(INDEPENDENT, pair=number, wall_s=independent_s),
    )
