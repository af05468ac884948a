"""`python -m treepo_async.actor WIRING`: one actor as a process. Actor 0 also evaluates."""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp

from treepo_async.actor.evaluate import Evaluator
from treepo_async.actor.expand import ExpandSettings
from treepo_async.actor.replay_client import ReplayClient
from treepo_async.actor.worker import RewardSettings, Worker
from treepo_async.config.command_line import load
from treepo_async.config.limits import prompt_limit
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.data.source import open_source
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.engine.client import EngineClient, SamplingSettings
from treepo_async.engine.gate import GateClient
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.metrics.events import emit
from treepo_async.metrics.role import run_role
from treepo_async.scoring.boxed import boxed_end
from treepo_async.scoring.registry import get_scorer
from treepo_async.tree.growth import GrowthRules
from treepo_async.tree.stopping import StopRules
from treepo_async.wire.sockets import Requester


async def main(wiring: Wiring) -> None:
    """Grow trees until the leases end, then stay for evaluations until the driver ends the process."""
    config = load(wiring.config_file)
    model = json.loads((Path(wiring.model_dir) / "config.json").read_text())
    tokenizer = TextTokenizer.load(Path(wiring.model_dir))
    settings = expand_settings(config, tokenizer)
    evaluates = wiring.index == 0 and config.eval.every > 0
    gate = GateClient(
        wiring.gate_endpoint,
        name=wiring.role,
        evaluates=evaluates,
        timeout_s=config.engine.start_timeout_s + config.eval.timeout_s,
    )
    requester = Requester(wiring.replay_endpoint, name=wiring.role, owner="replay")
    async with (
        requester,
        gate,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        replay = ReplayClient(requester, reply_timeout_s=config.cluster.start_timeout_s)
        engine = EngineClient(
            wiring.engine_url,
            gate,
            session,
            namespace=wiring.run_id,
            vocab_size=model["vocab_size"],
            request_timeout_s=config.engine.request_timeout_s,
            update_mode=UpdateMode(config.engine.update_mode),
        )
        await replay.hello(
            name=wiring.role, run_id=wiring.run_id, timeout_s=config.cluster.start_timeout_s
        )
        emit("ready")
        reward = config.reward
        scoring = RewardSettings(
            get_scorer(reward.scorer),
            reward.correct,
            reward.wrong,
            reward.timeout_s,
            reward.shuffle,
        )
        worker = Worker(wiring.role, replay, engine, settings, scoring, config.seed)
        async with asyncio.TaskGroup() as tasks:
            if evaluates:
                evaluator = _evaluator(config, model, tokenizer, settings, engine, gate)
                tasks.create_task(evaluator.run(), name="evaluation")
            await worker.serve(config.actor.concurrent_trees)


def expand_settings(config: Config, tokenizer: TextTokenizer) -> ExpandSettings:
    """How this run grows its trees."""
    tree = config.tree
    return ExpandSettings(
        growth=GrowthRules(
            segment_tokens=tree.segment_tokens,
            max_depth=tree.max_depth,
            width=tree.width,
            branching_factor=tree.branching_factor,
            first_fork_min=tree.first_fork_min,
            first_fork_max=tree.first_fork_max,
            fallback=tree.fallback == "random",
            max_response_tokens=tree.max_response_tokens,
        ),
        stops=StopRules(
            eos_token_ids=tokenizer.eos_token_ids,
            decode=tokenizer.decode,
            boxed_end=boxed_end if tree.stop_boxed else None,
            repetition_window=tree.repetition_window,
            repetition_count=tree.repetition_count,
        ),
        sampling=SamplingSettings(tree.temperature, tuple(sorted(tokenizer.eos_token_ids))),
    )


def _evaluator(
    config: Config,
    model: dict[str, int],
    tokenizer: TextTokenizer,
    settings: ExpandSettings,
    engine: EngineClient,
    gate: GateClient,
) -> Evaluator:
    source = open_source(
        config.data,
        tokenizer=tokenizer,
        seed=config.seed,
        max_prompt_tokens=prompt_limit(config, model),
    )
    return Evaluator(
        engine,
        gate,
        source.heldout(config.eval.problems),
        settings,
        scorer=get_scorer(config.reward.scorer),
        num_samples=config.eval.samples,
        timeout_s=config.eval.timeout_s,
    )


if __name__ == "__main__":
    asyncio.run(run_role(main(Wiring.parse(sys.argv[1]))))
