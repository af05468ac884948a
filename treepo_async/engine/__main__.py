"""`python -m treepo_async.engine WIRING`: the engine host as a process."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import aiohttp

from treepo_async.config.command_line import load
from treepo_async.config.limits import gap_alarm
from treepo_async.config.schema import Config
from treepo_async.config.wiring import Wiring
from treepo_async.engine.adopted import AdoptedServer, Needs
from treepo_async.engine.api_key import bearer, key_for_run
from treepo_async.engine.broadcast import BroadcastPublications
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.publications import FolderPublications, Publications
from treepo_async.engine.server import Server, ServerOptions, options_of
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.metrics.role import run_role
from treepo_async.weights.store import WeightStore, versions_in
from treepo_async.wire.hello import hello_of
from treepo_async.wire.keys import client_keys, server_keys
from treepo_async.wire.sockets import Requester


async def main(wiring: Wiring) -> None:
    """Run the host until the driver ends it."""
    config = load(wiring.config_file)
    key = key_for_run(config.engine, wiring.engine_key_file)
    async with (
        AsyncExitStack() as stack,
        aiohttp.ClientSession(headers=bearer(key)) as session,
    ):
        server = _server(config, wiring, session)
        keeper = GateKeeper(wiring.gate_endpoint, keys=server_keys(wiring.keys_dir))
        publications = await stack.enter_async_context(_publications(config, wiring))
        host = Host(
            server=server,
            keeper=keeper,
            publications=publications,
            rules=_host_rules(config),
            base_dir=Path(wiring.model_dir),
            evaluates=wiring.index == 0 and config.eval.every > 0,
            evaluates_base=wiring.resume_step is None and not _published(wiring.weights_dir),
        )
        try:
            await host.run()
        finally:
            keeper.shut()
            await server.stop()


@asynccontextmanager
async def _publications(config: Config, wiring: Wiring) -> AsyncIterator[Publications]:
    """Where the host gets weights from."""
    if not wiring.weights_endpoint:
        yield FolderPublications(
            WeightStore(wiring.weights_dir, keep=config.replay.max_staleness + 3)
        )
        return
    async with Requester(
        wiring.weights_endpoint,
        name=wiring.role,
        owner="the learner",
        hello=hello_of(wiring),
        keys=client_keys(wiring.keys_dir, wiring.role),
    ) as requester:
        yield BroadcastPublications(
            requester,
            engine=wiring.role,
            tp=config.engine.tp,
            timeout_s=config.weights.timeout_s,
        )


def _published(folder: Path) -> bool:
    """Whether the run has published anything, as far as this machine can see."""
    return folder.is_dir() and bool(versions_in(folder))


def _server(config: Config, wiring: Wiring, session: aiohttp.ClientSession) -> Server:
    """One that is started here, or the one that runs at the wiring's address."""
    model = json.loads((Path(wiring.model_dir) / "config.json").read_text())
    options = _server_options(config, wiring, model)
    if config.engine.url is None:
        return Server(options, session)
    needs = Needs(
        vocab_size=model["vocab_size"],
        context_length=options.context_length,
        dtype=options.dtype,
        updates_under_load=options.updates_under_load,
    )
    return AdoptedServer(wiring.engine_url, options, needs, session)


def _server_options(config: Config, wiring: Wiring, model: Mapping[str, Any]) -> ServerOptions:
    return options_of(
        config,
        model,
        port=urlparse(wiring.engine_url).port or 0,
        host=urlparse(wiring.engine_url).hostname or "127.0.0.1",
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
