"""Who runs where: nodes and what a run asks of them, to a place for each rank, engine, actor and replay. Pure; imports no Ray.

    nodes (GPUs, CPUs) + Demand -> place() -> Placement, or a ConfigError with the arithmetic

Rules, in this order:

* a tensor-parallel group lies in one node, and so does an engine;
* the learner's ranks go to nodes in blocks of tp, numbered tensor, then pipeline, then data parallel, so that the ranks of a node
  follow each other. Of all ways the one is taken that cuts the fewest pipelines, then takes the fewest nodes, then the first ones;
* a way that leaves no room for the engines is none;
* engines are dealt to the nodes with the fewest of them. Neighbours in number lie on different nodes, so that the engines of an
  actor (`actor.engines`) do not all go with one node;
* replay is beside rank 0; actors are spread over all nodes, beside their home engines where that goes. Both take no slot.

A slot is a GPU; where no node has one, held by others or not, a CPU as Ray counts them. One node with too few GPUs, all of them
free, is shared: its ranks have a GPU each, and engines share these. Neighbours: `plan` wires what is placed, `hosts` has Ray start it there, `placement_text` prints it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from treepo_async.config.layout import Layout
from treepo_async.config.limits import check_engine_tp
from treepo_async.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    id: str
    """As Ray names it."""
    address: str
    cpus: int
    """That are free; of a plan without a cluster 0 where nobody said."""
    gpus: int
    """That are free."""
    all_gpus: int
    """Also those that others hold."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a run asks for."""

    layout: Layout
    engines: int
    engine_tp: int
    """Slots of an engine; 0: it runs already, elsewhere."""
    actors: int

    @property
    def engine_slots(self) -> int:
        """Of all engines together."""
        return self.engines * self.engine_tp


@dataclass(frozen=True, slots=True)
class Share:
    """The learner's ranks on one node."""

    node: int
    """Index among the nodes."""
    first_rank: int
    num_ranks: int
    gpus: tuple[int, ...]
    """Numbers within the node, one a rank; empty where slots are CPUs."""


@dataclass(frozen=True, slots=True)
class Seat:
    """An engine's place."""

    node: int
    gpus: tuple[int, ...]
    """Numbers within the node; empty where slots are CPUs."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything of a run is."""

    nodes: tuple[Node, ...]
    on_gpus: bool
    """Whether slots are GPUs."""
    is_shared: bool
    """Whether engines share the GPUs of ranks or of each other."""
    learner: tuple[Share, ...]
    """By node, in the order of ranks."""
    engines: tuple[Seat, ...]
    actors: tuple[int, ...]
    """Index of the node of each."""

    @property
    def replay(self) -> int:
        """Index of the node of rank 0."""
        return self.learner[0].node

    def used(self) -> list[int]:
        """Indices of the nodes that something runs on."""
        found = {share.node for share in self.learner} | {seat.node for seat in self.engines}
        return sorted(found | set(self.actors))


def place(demand: Demand, nodes: Sequence[Node]) -> Placement:
    """Give everything its place.

    Args:
        demand: of the run.
        nodes: with what is free on them, the one first that shall be filled first.

    Raises:
        ConfigError: there is no room, with the numbers and what would do.
    """
    if not nodes:
        raise ConfigError("the Ray cluster has no living node; start one with: ray start")
    on_gpus = any(node.all_gpus for node in nodes)
    if demand.engines:
        check_engine_tp(demand.engine_tp, on_gpus=on_gpus)
    slots = [node.gpus if on_gpus else node.cpus for node in nodes]
    if on_gpus and len(nodes) == 1 and _must_share(demand, nodes[0]):
        return _shared(demand, nodes[0])
    blocks = _divide(demand, slots)
    if blocks is None:
        raise ConfigError(_why_not(demand, slots, "GPU" if on_gpus else "CPU"))
    learner = _shares(demand.layout, blocks, on_gpus=on_gpus)
    left = [n - b * demand.layout.tp for n, b in zip(slots, blocks, strict=True)]
    homes = _deal(demand.engines, [_room(demand, free) for free in left])
    engines = _seats(homes, demand, slots, left, on_gpus=on_gpus)
    actors = _actors(demand.actors, homes, num_nodes=len(nodes))
    return Placement(tuple(nodes), on_gpus, False, learner, engines, actors)


def _must_share(demand: Demand, node: Node) -> bool:
    """Whether a node is too small for all to have their own, and large enough for each; of what others hold none is shared."""
    size = demand.layout.world_size
    fits_apart = size + demand.engine_slots <= node.gpus
    is_free = node.gpus == node.all_gpus
    return is_free and not fits_apart and max(size, demand.engine_tp) <= node.gpus


def _shared(demand: Demand, node: Node) -> Placement:
    """All on one node with too few GPUs: engines from its last GPU down, and again from there."""
    size, tp = demand.layout.world_size, demand.engine_tp
    rows = node.gpus // tp if tp else 1
    seats = []
    for index in range(demand.engines):
        end = node.gpus - index % rows * tp
        seats.append(Seat(0, tuple(range(end - tp, end))))
    learner = (Share(0, 0, size, tuple(range(size))),)
    return Placement((node,), True, True, learner, tuple(seats), (0,) * demand.actors)


# ---------------------------------------------------------------- the learner


class _Way(NamedTuple):
    """The blocks that the first nodes take; the smallest is the best."""

    cuts: int
    """Of pipelines, between nodes."""
    used: int
    """Nodes with ranks."""
    order: tuple[int, ...]
    """Blocks of each node so far, negative: the first nodes are filled first."""
    engines: int
    """That have room on the nodes so far."""


def _divide(demand: Demand, slots: Sequence[int]) -> list[int] | None:
    """Blocks of tp ranks that each node takes, or None where there is no room."""
    layout = demand.layout
    total = layout.pp * layout.dp
    ways: dict[int, list[_Way]] = {0: [_Way(0, 0, (), 0)]}
    for free in slots:
        longer: dict[int, list[_Way]] = {}
        for done, found in ways.items():
            for taken in range(min(free // layout.tp, total - done) + 1):
                room = _room(demand, free - taken * layout.tp)
                end = done + taken
                is_cut = taken > 0 and end % layout.pp > 0
                longer.setdefault(end, []).extend(
                    _Way(
                        way.cuts + is_cut,
                        way.used + (taken > 0),
                        (*way.order, -taken),
                        min(way.engines + room, demand.engines),
                    )
                    for way in found
                )
        ways = {end: _undominated(found) for end, found in longer.items()}
    able = [way for way in ways.get(total, []) if way.engines >= demand.engines]
    return [-taken for taken in min(able).order] if able else None


def _room(demand: Demand, slots: int) -> int:
    """Engines that so many slots of a node hold."""
    return slots // demand.engine_tp if demand.engine_tp else demand.engines


def _undominated(ways: list[_Way]) -> list[_Way]:
    """Without those that another one beats in preference and in room for engines."""
    kept: list[_Way] = []
    for way in sorted(ways):
        if not kept or way.engines > kept[-1].engines:
            kept.append(way)
    return kept


def _shares(layout: Layout, blocks: Sequence[int], *, on_gpus: bool) -> tuple[Share, ...]:
    shares, first = [], 0
    for node, taken in enumerate(blocks):
        number = taken * layout.tp
        if number:
            gpus = tuple(range(number)) if on_gpus else ()
            shares.append(Share(node, first, number, gpus))
            first += number
    return tuple(shares)


# ---------------------------------------------------------------- engines and actors


def _deal(number: int, room: Sequence[int]) -> list[int]:
    """The node of each engine: always one with the fewest, the freest of these first."""
    taken = [0] * len(room)
    homes = []
    for _ in range(number):
        able = [node for node, most in enumerate(room) if taken[node] < most]
        node = min(able, key=lambda node: (taken[node], -room[node], node))
        taken[node] += 1
        homes.append(node)
    return homes


def _seats(
    homes: Sequence[int],
    demand: Demand,
    slots: Sequence[int],
    left: Sequence[int],
    *,
    on_gpus: bool,
) -> tuple[Seat, ...]:
    """With their GPUs, which follow those of the ranks."""
    following = [all_ - free for all_, free in zip(slots, left, strict=True)]
    seats = []
    for node in homes:
        first = following[node]
        following[node] += demand.engine_tp
        gpus = tuple(range(first, following[node])) if on_gpus else ()
        seats.append(Seat(node, gpus))
    return tuple(seats)


def _actors(number: int, homes: Sequence[int], *, num_nodes: int) -> tuple[int, ...]:
    """Spread evenly over all nodes; each beside its home engine where that node is among those with the fewest."""
    taken = [0] * num_nodes
    placed = []
    for index in range(number):
        home = homes[index % len(homes)] if homes else 0
        node = min(range(num_nodes), key=lambda node: (taken[node], node != home, node))
        taken[node] += 1
        placed.append(node)
    return tuple(placed)


# ---------------------------------------------------------------- refusals


def _why_not(demand: Demand, slots: Sequence[int], unit: str) -> str:
    """The first rule that cannot be kept, with its numbers."""
    layout, total = demand.layout, sum(slots)
    largest, size = max(slots), demand.layout.world_size
    where = f"{len(slots)} node{'s' if len(slots) > 1 else ''}"
    if layout.tp > largest:
        return (
            f"learner={layout}: tp{layout.tp} needs {layout.tp} {unit}s in one node, the largest of {where} has "
            f"{largest}; lower tp and raise pp, or add a larger node"
        )
    blocks = sum(free // layout.tp for free in slots)
    if layout.pp * layout.dp > blocks:
        return (
            f"learner={layout} needs {size} {unit}s as {layout.pp * layout.dp} groups of tp{layout.tp}, each in one node; "
            f"{where} with {total} {unit}s have room for {blocks}; lower pp or dp, or add nodes"
        )
    most = _most_engines(demand, slots)
    return (
        f"engines={demand.engines} engine.tp={demand.engine_tp} need {demand.engine_slots} {unit}s, each engine in one node; "
        f"{total - size} are left of {total} on {where} after the learner's {size} ({layout}), with room for {most}; "
        f"{_fewer_engines(demand, most)}"
    )


def _most_engines(demand: Demand, slots: Sequence[int]) -> int:
    """Engines that have room beside the learner, wherever that is."""
    few, many = 0, demand.engines
    while few < many - 1:
        middle = (few + many) // 2
        less = Demand(demand.layout, middle, demand.engine_tp, demand.actors)
        few, many = (middle, many) if _divide(less, slots) is not None else (few, middle)
    return few


def _fewer_engines(demand: Demand, most: int) -> str:
    add = "make the learner smaller, or add nodes"
    if most:
        return f"lower engines to {most}, {add}"
    return f"lower engine.tp, {add}" if demand.engine_tp > 1 else add


# ---------------------------------------------------------------- nodes as text

DESCRIPTION = "NODESxGPUS or NODESxGPUSxCPUS, e.g. 4x8, 2x8,1x4 or 2x0x16"


def parse_nodes(text: str) -> list[Node]:
    """The nodes that `--nodes` describes, the first one first.

    Raises:
        ConfigError: it is written in another way, or has neither GPUs nor CPUs.
    """
    nodes: list[Node] = []
    for part in text.split(","):
        words = part.strip().split("x")
        if not 2 <= len(words) <= 3 or not all(word.isascii() and word.isdigit() for word in words):
            raise ConfigError(f"--nodes={text} does not describe nodes; write {DESCRIPTION}")
        number, gpus, cpus = (*map(int, words), 0)[:3]
        first = len(nodes)
        names = [f"node-{first + i}" for i in range(number)]
        nodes += [Node(name, name, cpus, gpus, all_gpus=gpus) for name in names]
    if not any(node.gpus or node.cpus for node in nodes):
        raise ConfigError(
            f"--nodes={text} has no GPUs; say how many CPUs a node has: {DESCRIPTION}"
        )
    return nodes
