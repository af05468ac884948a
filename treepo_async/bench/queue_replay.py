"""`python -m treepo_async.bench.queue_replay SPEC`: one replay process of the benchmark, or its stand-in without a protocol.

It is the server of a run (`replay.server`) with prompts made up on the spot. Nothing else is simplified; the benchmark says how
far the learner may be behind, and when something is drawn.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Self

from treepo_async.bench.queue_trees import VOCAB_SIZE, prompt_of
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import run_role
from treepo_async.process import keep_freed_memory
from treepo_async.replay.dead_letters import DeadLetters
from treepo_async.replay.peers import Peers
from treepo_async.replay.quarantine import Quarantine
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.server import GROUP_SIZE, ReplayServer, ServerLimits
from treepo_async.replay.store import Store
from treepo_async.wire.bare import answer_all
from treepo_async.wire.sockets import Router

RUN_ID = "bench"
MAX_BYTES = 64 * 2**20
SEGMENT_BYTES = 64 * 2**20
_ENDLESS = 10**9


class Arm(StrEnum):
    """What answers."""

    BARE = "bare"
    """A router that looks at nothing."""
    WIRE = "wire"
    """Replay that keeps trees in memory; the queue's own state goes to disk."""
    DURABLE = "durable"
    """Replay with trees on disk, one commit for all that is there."""
    SINGLE = "single"
    """The same, one commit for each message."""


@dataclass(frozen=True, slots=True)
class ReplaySpec:
    """A process."""

    arm: Arm
    endpoint: str
    folder: str
    prompts_per_batch: int
    max_staleness: int = _ENDLESS
    """Binds how many leases are out at once."""

    def to_json(self) -> str:
        """What `parse` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "arm": Arm(values["arm"])})


async def serve(spec: ReplaySpec) -> None:
    """Be replay until the process is ended."""
    folder = Path(spec.folder)
    store, state = Store.open(
        folder,
        RUN_ID,
        resume_step=None,
        segment_bytes=SEGMENT_BYTES,
        keeps_trees=spec.arm is not Arm.WIRE,
    )
    rules = QueueRules(
        prompts_per_batch=spec.prompts_per_batch,
        max_staleness=spec.max_staleness,
        num_batches=_ENDLESS,
        lease_timeout_s=_ENDLESS,
        max_attempts=3,
        drop_degenerate=True,
        max_refills=_ENDLESS,
        lease_limit_s=_ENDLESS,
    )
    router = Router(spec.endpoint, max_bytes=MAX_BYTES)
    server = ReplayServer(
        router=router,
        queue=Queue.of(rules, state, now=time.monotonic()),
        store=store,
        peers=Peers(run_id=RUN_ID, config_digest="", tokenizer_digest=""),
        prompt=prompt_of,
        limits=ServerLimits(
            vocab_size=VOCAB_SIZE,
            max_lost=_ENDLESS,
            max_tree_bytes=MAX_BYTES,
            max_disk_bytes=2**62,
            group_size=1 if spec.arm is Arm.SINGLE else GROUP_SIZE,
        ),
        dead_letters=DeadLetters(folder),
        quarantine=Quarantine(folder / "quarantine", 1),
    )
    emit("ready")
    try:
        await server.run()
    finally:
        router.close()
        store.close()


def main(spec: ReplaySpec) -> None:
    """Serve until the benchmark ends the process."""
    keep_freed_memory()
    if spec.arm is Arm.BARE:
        answer_all(spec.endpoint, max_bytes=MAX_BYTES)
    else:
        asyncio.run(run_role(serve(spec)))


if __name__ == "__main__":
    main(ReplaySpec.parse(sys.argv[1]))
