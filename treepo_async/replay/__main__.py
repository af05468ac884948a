"""`python -m treepo_async.replay WIRING`: the replay queue as a process.

It may be killed at any time and started again with the same wiring: it goes on at its newest position, and has the
trees that died with it grown again. Its first start in a resumed run goes on at the checkpoint's position. Where
`data.trees` names a file, that feeds the queue in the place of actors.
"""

import asyncio
import json
import sys
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
from treepo_async.replay.feed import TreeFeed
from treepo_async.replay.position_files import PositionFiles
from treepo_async.replay.queue import Queue
from treepo_async.replay.rules import QueueRules
from treepo_async.replay.server import ReplayServer
from treepo_async.replay.spool import MemorySpool, Spool
from treepo_async.types import Prompt
from treepo_async.wire.sockets import Router
from treepo_async.wire.tree_file import TreeFile


async def main(wiring: Wiring) -> None:
    """Serve until the driver ends the process."""
    config = load(wiring.config_file)
    model = json.loads((Path(wiring.model_dir) / "config.json").read_text())
    positions = PositionFiles(
        Path(wiring.run_dir) / "replay",
        wiring.run_id,
        kept_steps=config.checkpoint.every * config.checkpoint.keep,
    )
    queue = Queue.from_position(_queue_rules(config), positions.start(wiring.resume_step))
    spool = MemorySpool()
    feed = None if config.data.trees is None else _feed(config, model, queue, spool)
    router = Router(wiring.replay_endpoint, max_bytes=config.replay.max_tree_bytes)
    server = ReplayServer(
        router=router,
        queue=queue,
        spool=spool,
        positions=positions,
        prompt=_no_prompt if feed else _prompts(config, wiring, model),
        run_id=wiring.run_id,
        vocab_size=model["vocab_size"],
        max_lost=config.replay.max_lost,
        feed=feed,
    )
    emit("ready")
    try:
        await server.run()
    finally:
        router.close()


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


def _feed(config: Config, model: dict[str, int], queue: Queue, spool: Spool) -> TreeFeed:
    assert config.data.trees is not None, "trains on a file"
    return TreeFeed(
        TreeFile(Path(config.data.trees), vocab_size=model["vocab_size"]),
        epochs=config.data.epochs or 1,
        max_tokens=model["max_position_embeddings"],
        queue=queue,
        spool=spool,
    )


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
    )


if __name__ == "__main__":
    asyncio.run(run_role(main(Wiring.parse(sys.argv[1]))))
