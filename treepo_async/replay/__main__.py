"""`python -m treepo_async.replay WIRING`: the replay queue as a process.

It may be killed at any time and started again with the same wiring: it goes on where it stood. Its first start in a
resumed run gives out again the batches from the checkpoint's step on. Where `data.trees` names a file, that feeds the
queue in the place of actors.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from treepo_async.config.command_line import load
from treepo_async.config.limits import prompt_limit
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.data.source import EndOfData, open_source
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import run_role
from treepo_async.process import keep_freed_memory
from treepo_async.replay.dead_letters import DeadLetters
from treepo_async.replay.feed import TreeFeed
from treepo_async.replay.group import Group
from treepo_async.replay.peers import Peers
from treepo_async.replay.quarantine import Quarantine
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.server import ReplayServer, ServerLimits
from treepo_async.replay.store import Store
from treepo_async.types import Prompt
from treepo_async.wire.keys import server_keys
from treepo_async.wire.sockets import Router
from treepo_async.wire.tree_file import TreeFile

LEASE_LIMIT_FACTOR = 2
"""An actor closes its tree by itself long before its lease is taken back whatever it says."""
MAX_QUARANTINED = 100
"""Invalid trees of which something is kept."""


async def main(wiring: Wiring) -> None:
    """Serve until the driver ends the process."""
    keep_freed_memory()
    config = load(wiring.config_file)
    model_dir = Path(wiring.model_dir)
    model = json.loads((model_dir / "config.json").read_text())
    folder = Path(wiring.run_dir) / "replay"
    store, state = Store.open(
        folder,
        wiring.run_id,
        resume_step=wiring.resume_step,
        segment_bytes=config.replay.segment_bytes,
        keeps_trees=config.replay.durability == "disk",
    )
    router = Router(
        wiring.replay_endpoint,
        max_bytes=config.replay.max_tree_bytes,
        keys=server_keys(wiring.keys_dir),
    )
    server = ReplayServer(
        router=router,
        queue=Queue.of(_queue_rules(config), state, now=time.monotonic()),
        store=store,
        peers=Peers(
            run_id=wiring.run_id,
            config_digest=wiring.config_digest,
            tokenizer_digest=wiring.tokenizer_digest,
        ),
        prompt=_no_prompt if config.data.trees else _prompts(config, wiring, model),
        limits=ServerLimits(
            vocab_size=model["vocab_size"],
            max_lost=config.replay.max_lost,
            max_tree_bytes=config.replay.max_tree_bytes,
            max_disk_bytes=config.replay.max_disk_bytes,
        ),
        dead_letters=DeadLetters(folder),
        quarantine=Quarantine(folder / "quarantine", MAX_QUARANTINED),
        make_feed=_feed_maker(config, model),
        num_actors=config.actors,
    )
    emit("ready")
    try:
        await server.run()
    finally:
        router.close()
        store.close()


def _prompts(config: Config, wiring: Wiring, model: dict[str, int]) -> Callable[[int], Prompt]:
    source = open_source(
        config.data,
        tokenizer=TextTokenizer.load(Path(wiring.model_dir)),
        seed=config.seed,
        max_prompt_tokens=prompt_limit(config, model),
    )
    if source.num_skipped:
        emit("alarm", alarm="records skipped", number=source.num_skipped, first=source.skipped[0])
    return source.prompt


def _no_prompt(_: int) -> Prompt:
    raise EndOfData("the trees come from a file")


def _feed_maker(config: Config, model: dict[str, int]) -> Callable[[Group], TreeFeed] | None:
    if config.data.trees is None:
        return None
    trees = TreeFile(Path(config.data.trees), vocab_size=model["vocab_size"])

    def make(group: Group) -> TreeFeed:
        return TreeFeed(
            trees,
            epochs=config.data.epochs or 1,
            max_tokens=model["max_position_embeddings"],
            queue=group.queue,
            keep=group.add,
        )

    return make


def _queue_rules(config: Config) -> QueueRules:
    replay = config.replay
    return QueueRules(
        prompts_per_batch=replay.prompts_per_batch,
        max_staleness=replay.max_staleness,
        num_batches=config.steps,
        lease_timeout_s=replay.lease_timeout_s,
        max_attempts=replay.max_attempts,
        drop_degenerate=replay.drop_degenerate,
        max_refills=replay.max_refills,
        lease_limit_s=LEASE_LIMIT_FACTOR * config.actor.tree_timeout_s,
        regrow=replay.stale_trees == "regrow",
    )


if __name__ == "__main__":
    asyncio.run(run_role(main(Wiring.parse(sys.argv[1]))))
