"""`python -m treepo_async.bench.queue_actors SPEC`: simulated actors of one process, for the queue's benchmark.

Each asks for a lease, delivers a small tree, and begins again, over a `Requester` of its own as a real actor has. Waits: for
replay (deadline `PATIENCE_S` of each request); the process ends by itself after its time.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

from treepo_async.bench.queue_trees import Deliveries, make_tree
from treepo_async.errors import TreepoError
from treepo_async.metrics.events import emit
from treepo_async.wire.messages import AskLease, Hello, Leased
from treepo_async.wire.sockets import Requester

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class ActorsSpec:
    """A process."""

    endpoint: str
    run_id: str
    first: int
    """Number of the first actor."""
    number: int
    tokens: int
    segment: int
    seconds: float

    def to_json(self) -> str:
        """What `parse` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


async def run(spec: ActorsSpec) -> None:
    """Tell in one event the seconds of each delivery of each actor, and when they began and ended (the machine's clock)."""
    trees = Deliveries.of(make_tree(spec.tokens, spec.segment))
    hellos = [Hello(name=f"actor-{spec.first + i}", run_id=spec.run_id) for i in range(spec.number)]
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_act(spec, hello, trees)) for hello in hellos]
    waits = [task.result() for task in tasks]
    emit("delivered", waits=waits, began=began, ended=time.monotonic())


async def _act(spec: ActorsSpec, hello: Hello, trees: Deliveries) -> Sequence[float]:
    waits = []
    requester = Requester(spec.endpoint, name=hello.name, owner="replay", hello=hello)
    async with requester:
        await requester.ask(hello, timeout_s=PATIENCE_S, wait="a greeting")
        until = time.monotonic() + spec.seconds
        while time.monotonic() < until:
            ask = AskLease(wait_s=PATIENCE_S)
            leased, _ = await requester.ask(ask, timeout_s=PATIENCE_S, wait="a lease")
            if not isinstance(leased, Leased):
                raise TreepoError(f"{hello.name} asked for a lease, replay answered {leased}")
            message, tree = trees.put(leased.lease_id, leased.attempt, leased.least_step)
            began = time.perf_counter()
            await requester.ask(message, tree, timeout_s=PATIENCE_S, wait="an acknowledgement")
            waits.append(time.perf_counter() - began)
    return waits


if __name__ == "__main__":
    asyncio.run(run(ActorsSpec.parse(sys.argv[1])))
