"""A placement as a table that a person reads at once: node by node, with GPUs, ranks, engines, actors and replay."""

from collections.abc import Iterator, Sequence

from treepo_async.cluster.placement import Demand, Placement, Share
from treepo_async.config.layout import Layout

Row = tuple[str, str, str]
"""Node, what it uses there, who uses it."""


def describe(placement: Placement, demand: Demand, memory: Sequence[str] = ()) -> str:
    """The placement, and what must be reachable between nodes.

    Args:
        placement: of a run.
        demand: of the run.
        memory: what a rank of each stage holds, then what an engine holds; empty: not said.
    """
    rows = [("nodes", _summary(placement, demand), ""), *_rows(placement, demand, memory)]
    wide = max(8, *(len(name) for name, _, _ in rows))
    lines = [f"  {node:<{wide}} {text}" for node, text, _ in rows[:1]]
    lines += [f"  {node:<{wide}} {slots:<8} {text}" for node, slots, text in rows[1:]]
    return "\n".join([*lines, *(f"  {name:<{wide}} {text}" for name, text in _ports(placement))])


def coordinates(layout: Layout, rank: int) -> tuple[int, int, int]:
    """(tp, pp, dp) of a rank: ranks are numbered by tp first, then pp, then dp."""
    return rank % layout.tp, rank // layout.tp % layout.pp, rank // (layout.tp * layout.pp)


def _summary(placement: Placement, demand: Demand) -> str:
    unit = "GPU" if placement.on_gpus else "CPU"
    total = sum(node.gpus if placement.on_gpus else node.cpus for node in placement.nodes)
    used = demand.layout.world_size + demand.engine_slots
    text = (
        f"{len(placement.nodes)} with {total} {unit}s: {demand.layout.world_size} for the learner ({demand.layout}), "
        f"{demand.engine_slots} for {_count(demand.engines, 'engine')}"
    )
    if placement.is_shared:
        return f"{text}: {used} asked for, so engines share GPUs with ranks or each other; bound their memory with engine.max_total_tokens"
    return f"{text}, {total - used} free"


def _rows(placement: Placement, demand: Demand, memory: Sequence[str]) -> Iterator[Row]:
    for index, node in enumerate(placement.nodes):
        name = node.address if node.address == node.id else f"{node.address} {node.id[:6]}"
        rows = [*_slots_of(placement, demand, index, memory), *_others_of(placement, index)]
        for place, (slots, text) in enumerate(rows or [("", "nothing")]):
            yield ("" if place else name), slots, text


def _slots_of(
    placement: Placement, demand: Demand, node: int, memory: Sequence[str]
) -> Iterator[tuple[str, str]]:
    for share in placement.learner:
        if share.node == node:
            yield from _ranks_of(share, demand.layout, memory, on_gpus=placement.on_gpus)
    for number, seat in enumerate(placement.engines):
        if seat.node == node:
            size = f" (tp{demand.engine_tp})" if demand.engine_tp > 1 else ""
            held = f"  {memory[-1]}" if memory else ""
            what = "runs elsewhere" if demand.engine_tp == 0 else f"{size}{held}".lstrip()
            yield (
                _span("GPU", seat.gpus) if seat.gpus else "CPU",
                f"engine-{number}  {what}".rstrip(),
            )


def _ranks_of(
    share: Share, layout: Layout, memory: Sequence[str], *, on_gpus: bool
) -> Iterator[tuple[str, str]]:
    """One line a tensor-parallel group."""
    for offset in range(0, share.num_ranks, layout.tp):
        first = share.first_rank + offset
        _, stage, replica = coordinates(layout, first)
        gpus = share.gpus[offset : offset + layout.tp]
        text = _span("rank", range(first, first + layout.tp))
        if layout.tp > 1:
            text += f"  tp 0-{layout.tp - 1}"
        if layout.pp > 1:
            text += f"  stage {stage} of {layout.pp}"
        if layout.dp > 1:
            text += f"  replica {replica} of {layout.dp}"
        held = f"  {memory[stage]}" if memory else ""
        yield _span("GPU", gpus) if on_gpus else "CPU", f"{text}{held}"


def _others_of(placement: Placement, node: int) -> Iterator[tuple[str, str]]:
    if placement.replay == node:
        yield "CPU", "replay-0"
    actors = [number for number, home in enumerate(placement.actors) if home == node]
    if actors:
        names = ", ".join(map(str, actors[:8])) + (", ..." if actors[8:] else "")
        yield "CPU", f"{_count(len(actors), 'actor')}: {names}"


def _ports(placement: Placement) -> Iterator[tuple[str, str]]:
    """Who must reach whom."""
    nodes = [placement.nodes[index] for index in placement.used()]
    if len({node.address for node in nodes}) == 1:
        return
    leader = placement.nodes[placement.replay].address
    engines = sorted({placement.nodes[seat.node].address for seat in placement.engines})
    yield (
        "reach",
        f"{leader} from every node: replay (ZeroMQ with CURVE), free port from 10000 on",
    )
    if engines:
        yield (
            "",
            f"{', '.join(engines)} from every actor: SGLang (HTTP with a key) and gate (ZeroMQ with CURVE), two ports an engine",
        )
    if len(placement.learner) > 1:
        learner = [placement.nodes[share.node].address for share in placement.learner]
        yield "", f"{', '.join(learner)} from each other, all ports: gloo or NCCL of the ranks"
    yield "needs", "cluster.keys_dir, and run_dir, model and data under the same path on every node"


def _span(noun: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    return f"{noun} {numbers[0]}-{numbers[-1]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
