"""`python -m treepo_async.engine WIRING`: the engine host as a process."""

import asyncio
import json
import sys
from pathlib import Path
from urllib.parse import urlparse

import aiohttp

from treepo_async.config.command_line import load
from treepo_async.config.limits import gap_alarm
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.engine.api_key import bearer, ensure_key
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.server import Server, ServerOptions, options_of
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.metrics.role import run_role
from treepo_async.weights.store import WeightStore
from treepo_async.wire.keys import server_keys


async def main(wiring: Wiring) -> None:
    """Run the host until the driver ends it."""
    config = load(wiring.config_file)
    key = ensure_key(wiring.engine_key_file)
    async with aiohttp.ClientSession(headers=bearer(key)) as session:
        server = Server(_server_options(config, wiring), session)
        keeper = GateKeeper(wiring.gate_endpoint, keys=server_keys(wiring.keys_dir))
        store = WeightStore(wiring.weights_dir, keep=config.replay.max_staleness + 3)
        host = Host(
            server=server,
            keeper=keeper,
            store=store,
            rules=_host_rules(config),
            base_dir=Path(wiring.model_dir),
            evaluates=wiring.index == 0 and config.eval.every > 0,
            evaluates_base=wiring.resume_step is None and not store.versions(),
        )
        try:
            await host.run()
        finally:
            keeper.shut()
            await server.stop()


def _server_options(config: Config, wiring: Wiring) -> ServerOptions:
    model = json.loads((Path(wiring.model_dir) / "config.json").read_text())
    return options_of(
        config,
        model,
        port=urlparse(wiring.engine_url).port or 0,
        log_file=Path(wiring.run_dir) / "logs" / f"sglang-{wiring.index}.log",
        updates_under_load=config.engine.update_mode != UpdateMode.DRAIN,
        key_file=wiring.engine_key_file,
    )


def _host_rules(config: Config) -> HostRules:
    return HostRules(
        update_mode=UpdateMode(config.engine.update_mode),
        start_timeout_s=config.engine.start_timeout_s,
        drain_timeout_s=config.engine.drain_timeout_s,
        update_timeout_s=config.engine.update_timeout_s,
        eval_timeout_s=config.eval.timeout_s,
        max_restarts=config.engine.max_restarts,
        max_staleness=config.replay.max_staleness,
        gap_alarm=gap_alarm(config),
        grows_trees=config.data.trees is None,
        dtype=config.model.dtype,
        hang_timeout_s=config.engine.hang_timeout_s,
    )


if __name__ == "__main__":
    asyncio.run(run_role(main(Wiring.parse(sys.argv[1]))))
