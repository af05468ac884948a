"""`python -m treepo_async.actor WIRING`: one actor as a process. Actor 0 also evaluates.

SIGTERM ends it in order: no further lease, and those it holds go back to replay. It ends by itself, with the reason, when its
leases keep failing (`health`).
"""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp

from treepo_async.actor.engines import Engines, open_engines
from treepo_async.actor.evaluate import Evaluator
from treepo_async.actor.expand import ExpandSettings
from treepo_async.actor.grow import Grower
from treepo_async.actor.health import Health
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.score import Scoring, open_scoring
from treepo_async.actor.settings import expand_settings
from treepo_async.actor.worker import Worker
from treepo_async.config.command_line import load
from treepo_async.config.limits import prompt_limit, response_limit
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.data.source import open_source
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.api_key import bearer, key_for_run
from treepo_async.metrics.categories import ACTOR
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.role import run_role
from treepo_async.metrics.slots import Slots
from treepo_async.metrics.tell import Teller, telling
from treepo_async.wire.hello import hello_of
from treepo_async.wire.keys import client_keys
from treepo_async.wire.sockets import Requester


async def main(wiring: Wiring) -> None:
    """Grow trees until the leases end, then stay for evaluations until the driver ends the process."""
    config = load(wiring.config_file)
    model = json.loads((Path(wiring.model_dir) / "config.json").read_text())
    tokenizer = TextTokenizer.load(Path(wiring.model_dir))
    settings = _settings(config, tokenizer)
    keys = client_keys(wiring.keys_dir, wiring.role)
    evaluates = wiring.index == 0 and config.eval.every > 0
    hello = hello_of(wiring)
    requester = Requester(
        wiring.replay_endpoint,
        name=wiring.role,
        owner="replay",
        hello=hello,
        keys=keys,
        max_bytes=config.replay.max_tree_bytes,
    )
    async with (
        requester,
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            headers=bearer(key_for_run(config.engine, wiring.engine_key_file)),
        ) as session,
        open_engines(
            wiring,
            config.engine,
            session,
            vocab_size=model["vocab_size"],
            evaluates=evaluates,
            timeout_s=config.engine.start_timeout_s + config.eval.timeout_s,
        ) as engines,
        open_scoring(
            config.reward,
            decode=tokenizer.decode,
            max_response_tokens=response_limit(config),
        ) as scoring,
    ):
        replay = ReplayClient(
            requester,
            reply_timeout_s=config.cluster.start_timeout_s,
            max_tree_bytes=config.replay.max_tree_bytes,
        )
        await replay.hello(hello, timeout_s=config.cluster.start_timeout_s)
        emit("ready")
        grower = Grower(
            wiring.role, engines.trees, settings, scoring, config.seed, config.reward.shuffle
        )
        slots = Slots(SlotLedger(ACTOR))
        worker = Worker(replay, grower, Health(config.actor.sick_after), slots)
        async with telling(Teller(slots.ledger, "actor")), asyncio.TaskGroup() as tasks:
            if evaluates:
                evaluator = _evaluator(config, model, tokenizer, settings, engines, scoring, slots)
                tasks.create_task(evaluator.run(), name="evaluation")
            await worker.serve(config.actor.concurrent_trees)


def _settings(config: Config, tokenizer: TextTokenizer) -> ExpandSettings:
    return expand_settings(
        config.tree,
        tokenizer,
        prune=config.prune,
        stream_tokens=config.engine.stream_tokens,
        max_staleness=config.replay.max_staleness,
        num_steps=config.steps,
        timeout_s=config.actor.tree_timeout_s,
    )


def _evaluator(
    config: Config,
    model: dict[str, int],
    tokenizer: TextTokenizer,
    settings: ExpandSettings,
    engines: Engines,
    scoring: Scoring,
    slots: Slots,
) -> Evaluator:
    source = open_source(
        config.data,
        tokenizer=tokenizer,
        seed=config.seed,
        max_prompt_tokens=prompt_limit(config, model),
    )
    return Evaluator(
        engines.home,
        engines.home_gate,
        source.heldout(config.eval.problems),
        settings,
        scorer=scoring.scorer,
        num_samples=config.eval.samples,
        timeout_s=config.eval.timeout_s,
        booked=slots.evaluating,
    )


if __name__ == "__main__":
    asyncio.run(run_role(main(Wiring.parse(sys.argv[1]))))
