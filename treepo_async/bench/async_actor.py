"""An actor of a scripted run: the loop of a real one, with an engine that sleeps.

Waits: as `actor.worker`. It tells every `TELL_S` what its slots have waited for so far, so that any part of a run can be cut
out of the sums, and when its engine had requests since it told last.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from treepo_async.actor.expand import ExpandSettings
from treepo_async.actor.grow import Grower
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.score import Scoring
from treepo_async.actor.worker import Worker
from treepo_async.bench.async_script import RUN_ID, Script
from treepo_async.bench.async_service import EOS, GateTally, TimedEngine
from treepo_async.bench.queue_trees import prompt_of
from treepo_async.engine.client import SamplingSettings
from treepo_async.engine.gate import EngineGate, GateClient
from treepo_async.metrics.events import emit
from treepo_async.scoring.async_scorer import Inline
from treepo_async.scoring.reward import RewardRules
from treepo_async.tree.stopping import StopRules
from treepo_async.types import Prompt, Tree
from treepo_async.wire.messages import Hello, Leased
from treepo_async.wire.sockets import Requester

PATIENCE_S = 120.0
TELL_S = 0.1

MakeEngine = Callable[[Prompt, random.Random], TimedEngine]


@dataclass(frozen=True)
class TimedGrower(Grower):
    """Grows each tree on an engine of its own, so that trees do not see each other's requests."""

    make_engine: MakeEngine = field(kw_only=True)

    async def grow(
        self,
        prompt: Prompt,
        *,
        lease_id: str,
        attempt: int = 1,
        least_step: int = 0,
        old_tree: Tree | None = None,
    ) -> Tree:
        """See `Grower.grow`."""
        engine = self.make_engine(prompt, random.Random(f"{self.seed}/{lease_id}/{attempt}/engine"))
        alone = Grower(self.actor, engine, self.settings, self.scoring, self.seed, self.shuffle)
        return await alone.grow(
            prompt, lease_id=lease_id, attempt=attempt, least_step=least_step, old_tree=old_tree
        )


def timed_grower(script: Script, name: str, gate: EngineGate, tally: GateTally) -> TimedGrower:
    """The grower of an actor of a script."""

    def make_engine(prompt: Prompt, rng: random.Random) -> TimedEngine:
        return TimedEngine(
            script.service, gate, script.update_mode, len(prompt.token_ids), rng, tally
        )

    rules = script.rules
    return TimedGrower(
        actor=name,
        engine=make_engine(prompt_of(0), random.Random(0)),
        settings=ExpandSettings(
            growth=rules,
            stops=StopRules(eos_token_ids=frozenset({EOS}), decode=_parity),
            sampling=SamplingSettings(temperature=1.0, stop_token_ids=(EOS,)),
        ),
        scoring=Scoring(Inline(_is_odd), _parity, RewardRules(1.0, -1.0, rules.limit)),
        seed=script.seed,
        make_engine=make_engine,
    )


def _parity(token_ids: Sequence[int]) -> str:
    """All the text there is."""
    return "odd" if sum(token_ids) % 2 else "even"


def _is_odd(response: str, _: str) -> float:
    return float(response == "odd")


class TellingClient(ReplayClient):
    """Adds up what the slots of its actor wait for replay."""

    def __init__(self, requester: Requester) -> None:
        super().__init__(requester, reply_timeout_s=PATIENCE_S)
        self._waited = {"lease": 0.0, "put": 0.0}
        self._since: dict[object, tuple[str, float]] = {}

    def waited(self) -> dict[str, float]:
        """Slot-seconds so far for leases and for acknowledgements, waits that go on included."""
        now, totals = time.monotonic(), dict(self._waited)
        for what, begin in self._since.values():
            totals[what] += now - begin
        return totals

    async def lease(self) -> tuple[Leased, Tree | None] | None:
        """See `ReplayClient.lease`."""
        wait = self._begin("lease")
        try:
            return await super().lease()
        finally:
            self._end(wait)

    async def put(self, lease: Leased, tree: Tree) -> None:
        """See `ReplayClient.put`."""
        wait = self._begin("put")
        try:
            await super().put(lease, tree)
        finally:
            self._end(wait)

    def _begin(self, what: str) -> object:
        wait = object()
        self._since[wait] = (what, time.monotonic())
        return wait

    def _end(self, wait: object) -> None:
        what, begin = self._since.pop(wait)
        self._waited[what] += time.monotonic() - begin


async def act(script: Script, index: int) -> None:
    """An actor for ever."""
    name = f"actor-{index}"
    hello, tally = Hello(name=name, run_id=RUN_ID), GateTally()
    gate = GateClient(script.gate_endpoint(index), name=name, evaluates=False, timeout_s=PATIENCE_S)
    requester = Requester(script.replay_endpoint, name=name, owner="replay", hello=hello)
    async with requester, gate, asyncio.TaskGroup() as tasks:
        client = TellingClient(requester)
        await client.hello(hello, timeout_s=PATIENCE_S)
        tasks.create_task(_tell(client, tally))
        worker = Worker(client, timed_grower(script, name, gate, tally))
        await worker.serve(script.slots)


async def _tell(client: TellingClient, tally: GateTally) -> None:
    while True:
        busy, at = tally.take_busy(), time.monotonic()
        emit("slots", at=at, gate=tally.seconds(), busy=busy, **client.waited())
        await asyncio.sleep(TELL_S)
