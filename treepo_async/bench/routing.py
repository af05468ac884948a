"""Where requests go with two engines: `bench.py routing`.

Two SGLang servers, several actors that know of each other only what the gates tell them, and uneven trees. Every
measurement has a cache namespace of its own in empty caches, and all trees of a round are the same for each policy. The weights that an
update loads are those that are there already: what is measured is what becomes of prefixes.

Waits: for the servers to start (`START_S`), for each answer (`REQUEST_S`), for running requests at an update (`DRAIN_S`).
"""

import asyncio
import contextlib
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiohttp
import numpy as np

from treepo_async.actor.expand import ExpandSettings, expand
from treepo_async.actor.settings import expand_settings
from treepo_async.bench import machine, routing_report
from treepo_async.bench.cells import Stop
from treepo_async.bench.engine import VOCAB_SIZE
from treepo_async.bench.model import MAX_CONTEXT, prepare
from treepo_async.bench.routing_cells import (
    NUM_ENGINES,
    NUM_UPDATES,
    SEGMENT_TOKENS,
    RoutingCell,
    RoutingOptions,
    TreeShape,
    Update,
    policy_of,
    shapes_of,
)
from treepo_async.bench.routing_report import RoutingSample
from treepo_async.config.schema import TreeConfig
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.client import EngineClient
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.pool import EnginePool, Member
from treepo_async.engine.server import Server, ServerOptions, num_in_flight
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import EngineError
from treepo_async.process import free_ports
from treepo_async.tiny.tokenizer import SPECIAL_TOKENS
from treepo_async.types import PolicyVersion, Prompt, Provenance

START_S = 300.0
REQUEST_S = 300.0
DRAIN_S = 60.0
CALL_S = 60.0
LOAD_S = 0.25
GATE_S = 120.0
CACHE_TOKENS = 65536
RUNNING_REQUESTS = 64
WARM_UP_TREES = 4
BASE = PolicyVersion(0, 0)


@dataclass
class Grown:
    """The costs of the trees that are there."""

    costs: list[Provenance] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, cost: Provenance) -> None:
        """One more."""
        self.costs.append(cost)
        self._changed.set()

    async def reach(self, number: float) -> None:
        """Until there are so many."""
        while len(self.costs) < number:
            self._changed.clear()
            await self._changed.wait()


@dataclass
class House:
    """One engine, its gate, and the weights in it."""

    server: Server
    keeper: GateKeeper
    endpoint: str
    model_dir: Path
    version: PolicyVersion = BASE

    async def open(self) -> None:
        """Let requests in."""
        await self.keeper.open(self.version, evaluate=False, hold_s=0)

    async def update(self, update: Update) -> None:
        """Load the weights again, under the next version, as an engine host would.

        Raises:
            EngineError: SGLang did not take them.
        """
        self.version = PolicyVersion(0, self.version.step + 1)
        await self.keeper.close()
        if update is Update.DRAIN:
            if not await self.keeper.drained(timeout_s=DRAIN_S):
                raise EngineError(f"requests ran for more than {DRAIN_S:g} s")
            await self.server.flush_cache(timeout_s=CALL_S)
        else:
            await self.server.pause(update.value, timeout_s=CALL_S)
        await self.server.load_weights(self.model_dir, str(self.version), timeout_s=CALL_S)
        if update is not Update.DRAIN:
            await self.server.resume(timeout_s=CALL_S)
        await self.open()

    async def tell_load(self) -> None:
        """Tell the clients, as a host does, what the server has to do. For ever."""
        while True:
            await asyncio.sleep(LOAD_S)
            with contextlib.suppress(EngineError):
                self.keeper.tell_load(num_in_flight(await self.server.loads()))


async def compare(options: RoutingOptions, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Measure, say what comes out, and write it.

    Raises:
        TreepoError: from an engine.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    machine.note(options.out / "environment.json")
    model_dir = await asyncio.to_thread(
        prepare, cache_dir, options.layers, options.hidden, Stop.NONE
    )
    samples = list[RoutingSample]()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for under_load in (False, True):
            cells = [cell for cell in options.cells if is_under_load(cell) == under_load]
            async for sample in _measured(cells, options, model_dir, session):
                samples.append(sample)
                routing_report.append(options.out / "samples.csv", [sample])
                say(routing_report.line(sample))
    table = routing_report.table(samples)
    (options.out / "table.md").write_text(table)
    say(table)


def is_under_load(cell: RoutingCell) -> bool:
    """Whether weights change under requests, for which SGLang is started in another way."""
    return cell.update is Update.RETRACT


async def _measured(
    cells: Sequence[RoutingCell],
    options: RoutingOptions,
    model_dir: Path,
    session: aiohttp.ClientSession,
) -> AsyncIterator[RoutingSample]:
    """Every cell in turn, on engines that are started for them."""
    if not cells:
        return
    async with contextlib.AsyncExitStack() as stack:
        houses = [
            await stack.enter_async_context(_house(model_dir, session, is_under_load(cells[0])))
            for _ in range(NUM_ENGINES)
        ]
        await measure(cells[0], replace(options, trees=WARM_UP_TREES), houses, session)
        for cell in cells:
            yield await measure(cell, options, houses, session)


async def measure(
    cell: RoutingCell,
    options: RoutingOptions,
    houses: list[House],
    session: aiohttp.ClientSession,
) -> RoutingSample:
    """All trees of a round, spread over the actors.

    Args:
        cell: which way, which updates, which trees.
        options: how many actors and trees.
        houses: the engines.
        session: HTTP connections.

    Raises:
        TreepoError: a tree could not be grown.
    """
    for house in houses:
        await house.server.flush_cache(timeout_s=CALL_S)
    tokenizer = TextTokenizer.load(houses[0].model_dir)
    shapes = iter(enumerate(shapes_of(options.trees, cell.round)))
    grown = Grown()
    async with contextlib.AsyncExitStack() as stack:
        pools = [
            await stack.enter_async_context(_pool(actor, cell, houses, session))
            for actor in range(options.actors)
        ]
        began = time.monotonic()
        updating = asyncio.create_task(_update(cell.update, houses, options.trees, grown))
        async with asyncio.TaskGroup() as tasks:
            for pool in pools * options.concurrent:
                tasks.create_task(_grow(pool, shapes, cell, tokenizer, grown))
        wall_s = time.monotonic() - began
        updating.cancel()
        await asyncio.gather(updating, return_exceptions=True)
        decoded = [
            sum(m.decoded_tokens for pool in pools for m in pool.members if m.name == h.server.url)
            for h in houses
        ]
    return RoutingSample.of(cell, grown.costs, decoded, wall_s)


async def _update(update: Update, houses: list[House], num_trees: int, grown: Grown) -> None:
    """Change the weights of all engines whenever another share of the trees is there."""
    if update is Update.NONE:
        return
    for number in range(1, NUM_UPDATES + 1):
        await grown.reach(num_trees * number / (NUM_UPDATES + 1))
        await asyncio.gather(*(house.update(update) for house in houses))


async def _grow(
    pool: EnginePool,
    shapes: Iterator[tuple[int, TreeShape]],
    cell: RoutingCell,
    tokenizer: TextTokenizer,
    grown: Grown,
) -> None:
    for number, shape in shapes:
        rng = np.random.default_rng([cell.round, number])
        low, high = len(SPECIAL_TOKENS), tokenizer.vocab_size
        tokens = rng.integers(low, high, shape.prompt_tokens, np.int32)
        _, cost = await expand(
            Prompt(str(number), tokens, "", ""),
            pool,
            _settings(shape, tokenizer),
            random.Random(number),
            lease_id=str(number),
            actor="bench",
            least_step=0,
        )
        grown.add(cost)


def _settings(shape: TreeShape, tokenizer: TextTokenizer) -> ExpandSettings:
    """Trees of full length: nothing ends a path before."""
    settings = expand_settings(
        TreeConfig(
            segment_tokens=SEGMENT_TOKENS,
            max_depth=shape.depth,
            width=shape.width,
            stop_boxed=False,
        ),
        tokenizer,
    )
    return replace(
        settings,
        stops=replace(settings.stops, eos_token_ids=frozenset(), repetition_count=0),
        sampling=replace(settings.sampling, stop_token_ids=()),
    )


@contextlib.asynccontextmanager
async def _pool(
    actor: int,
    cell: RoutingCell,
    houses: list[House],
    session: aiohttp.ClientSession,
) -> AsyncIterator[EnginePool]:
    """What an actor has of the engines, its home first."""
    home = actor % len(houses)
    mode = UpdateMode.RETRACT if cell.update is Update.RETRACT else UpdateMode.DRAIN
    members = list[Member]()
    async with contextlib.AsyncExitStack() as stack:
        for house in houses[home:] + houses[:home]:
            gate = GateClient(
                house.endpoint,
                name=f"actor-{actor}",
                evaluates=False,
                timeout_s=GATE_S,
                is_one_of_many=True,
            )
            client = EngineClient(
                house.server.url,
                await stack.enter_async_context(gate),
                session,
                namespace="-".join(map(str, cell)),
                vocab_size=VOCAB_SIZE,
                request_timeout_s=REQUEST_S,
                update_mode=mode,
            )
            async with gate.passage():
                members.append(Member(house.server.url, client, gate))
        policy = policy_of(cell.policy, cell.round * 100 + actor)
        yield EnginePool(members, timeout_s=GATE_S, choose=policy)


@contextlib.asynccontextmanager
async def _house(
    model_dir: Path, session: aiohttp.ClientSession, updates_under_load: bool
) -> AsyncIterator[House]:
    """An engine, started. Enter it in the main thread."""
    gate_port, engine_port = free_ports(2)
    endpoint = f"tcp://127.0.0.1:{gate_port}"
    context = json.loads((model_dir / "config.json").read_text())["max_position_embeddings"]
    with tempfile.TemporaryDirectory() as folder:
        options = ServerOptions(
            port=engine_port,
            dtype="float32",
            context_length=min(MAX_CONTEXT, context),
            max_total_tokens=CACHE_TOKENS,
            max_running_requests=RUNNING_REQUESTS,
            prefill_chunk_tokens=4096,
            log_file=Path(folder) / "sglang.log",
            updates_under_load=updates_under_load,
        )
        server, keeper = Server(options, session), GateKeeper(endpoint)
        house = House(server, keeper, endpoint, model_dir)
        tasks = [asyncio.create_task(keeper.serve()), asyncio.create_task(house.tell_load())]
        try:
            await server.start(model_dir, str(house.version), timeout_s=START_S)
            await house.open()
            yield house
        finally:
            for task in tasks:
                task.cancel()
            keeper.shut()
            await server.stop()
