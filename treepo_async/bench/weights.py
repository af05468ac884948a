"""The way of weights from a learner into an engine: `bench.py weights`.

A learner's process publishes, a real host has a real SGLang take it, arm by arm in turn, on one engine; before every update the same
bytes are copied plainly, into a file and back into memory. Every check that a run makes is made, and an update counts as done when the
gate is open under it. Neighbours: `weights_cells` reads the words, `weights_learner` is the other process, `weights_report` writes.

Waits: for SGLang to start (`START_S`) and for every update (`UPDATE_S`; the host, or its end, ends both).
"""

import asyncio
import contextlib
import io
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from treepo_async.bench import machine, weights_report
from treepo_async.bench.cells import Stop
from treepo_async.bench.engine import START_S
from treepo_async.bench.model import prepare
from treepo_async.bench.weights_cells import WeightsOptions
from treepo_async.bench.weights_learner import RUN_ID, LearnerJob, LearnerProcess
from treepo_async.bench.weights_report import Update
from treepo_async.engine.broadcast import BroadcastPublications
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.host import Host, HostRules
from treepo_async.engine.publications import FolderPublications, Publications
from treepo_async.engine.server import Server, ServerOptions
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import EngineError
from treepo_async.metrics.events import parse
from treepo_async.process import free_ports
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import Manifest, TensorInfo, published_tensors
from treepo_async.weights.store import WeightStore
from treepo_async.weights.tensor_file import num_bytes
from treepo_async.wire.messages import Hello
from treepo_async.wire.sockets import Requester

UPDATE_S = 120.0
GAP_ALARM = 1e-4
"""Nats, as in a run in float32."""
LOOK_S = 0.005


async def compare(options: WeightsOptions, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Measure, say what comes out, and write it.

    Raises:
        EngineError: an update failed.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    machine.note(options.out / "environment.json", folder=str(options.folder))
    model_dir = prepare(cache_dir, options.layers, options.hidden, Stop.NONE)
    size = sum(map(num_bytes, published_tensors(model_dir).values()))
    updates: list[Update] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="weights-") as name:
        async with _house(options, model_dir, Path(name)) as house:
            say(
                f"{size / 2**20:.0f} MiB of weights; the learner's log-probs of a probe take "
                f"{house.learner.score_s:.2f} s, which no figure has"
            )
            for number in range(options.rounds + 1):
                for arm in options.arms:
                    copy_s = plain_copy_s(Path(name) / "plain", size)
                    update = await house.update(arm, number, size, copy_s)
                    if number == 0:
                        continue  # opens groups, and touches memory for the first time
                    updates.append(update)
                    weights_report.append(options.out / "updates.csv", update)
                    say(weights_report.line(update))
    text = weights_report.table(updates)
    (options.out / "table.md").write_text(text)
    say(text)


def plain_copy_s(file: Path, size: int) -> float:
    """Seconds to write bytes into a new file and to read them back into memory that was used before."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    file.unlink(missing_ok=True)
    begin = time.monotonic()
    with file.open("wb", buffering=0) as out:
        out.write(source.data)
    with file.open("rb", buffering=0) as back:
        num_read = back.readinto(target.data)
    seconds = time.monotonic() - begin
    assert num_read == size
    file.unlink()
    return seconds


@dataclass
class _Arms:
    """All ways of an update at once: a version comes by one of them."""

    ways: Sequence[Publications]
    _way: Publications | None = None

    survives_restarts = True

    async def follow(self) -> None:
        """All of them."""
        await asyncio.gather(*(way.follow() for way in self.ways))

    def next_after(
        self,
        applied: PolicyVersion,
        *,
        refused: Collection[PolicyVersion],
        evaluates: bool,
        marked_only: bool,
    ) -> PolicyVersion | None:
        """The newest of any way."""
        newest = None
        for way in self.ways:
            found = way.next_after(
                applied, refused=refused, evaluates=evaluates, marked_only=marked_only
            )
            if found is not None and (newest is None or found > newest):
                newest, self._way = found, way
        return newest

    @property
    def way(self) -> Publications:
        """Of the version that was asked for last."""
        assert self._way is not None, "a version is asked for before it is taken"
        return self._way

    def has(self, version: PolicyVersion) -> bool:
        """See `Publications`."""
        return self.way.has(version)

    async def verified(
        self, version: PolicyVersion, expected: Mapping[str, TensorInfo]
    ) -> Manifest:
        """See `Publications`."""
        return await self.way.verified(version, expected)

    async def load(
        self, server: Server, version: PolicyVersion, *, flush: bool, timeout_s: float
    ) -> Manifest | None:
        """See `Publications`."""
        return await self.way.load(server, version, flush=flush, timeout_s=timeout_s)

    async def loaded(self, version: PolicyVersion, error: str) -> None:
        """See `Publications`."""
        await self.way.loaded(version, error)

    def folder_of(self, version: PolicyVersion) -> Path:
        """See `Publications`."""
        return self.way.folder_of(version)

    def age_s(self, manifest: Manifest) -> float:
        """See `Publications`."""
        return self.way.age_s(manifest)


@dataclass
class _House:
    """A host at work and the learner."""

    host: Host
    task: asyncio.Task[None]
    output: io.StringIO
    """What the host says."""
    learner: LearnerProcess
    _step: int = 0

    async def update(self, arm: str, number: int, size: int, copy_s: float) -> Update:
        """Publish by an arm and wait until the gate is open under it."""
        self._step += 1
        version, begin = PolicyVersion(0, self._step), self.output.tell()
        publish_s = await asyncio.to_thread(self.learner.publish, arm, self._step)
        async with asyncio.timeout(UPDATE_S):
            while self.host.applied != version or not (said := self._said(begin)):
                if self.task.done():
                    self.task.result()
                await asyncio.sleep(LOOK_S)
        if alarms := [event for event in said if event["event"] == "alarm"]:
            raise EngineError(f"{arm}: {alarms[0]}")
        (found,) = [event for event in said if event["event"] == "weights"]
        return Update(
            arm=arm,
            round=number,
            mib=size / 2**20,
            copy_s=copy_s,
            visible_s=found["publish_to_visible_s"],
            publish_s=publish_s,
            pause_s=found["pause_s"],
            drain_s=found["drain_s"],
            load_s=found["load_s"],
            probe_s=found["probe_s"],
            gap=found["gap"],
        )

    def _said(self, begin: int) -> list[dict[str, Any]]:
        """Events since then, once the one of the update is there."""
        lines = self.output.getvalue()[begin:].splitlines()
        found = [event for event in map(parse, lines) if event is not None]
        return found if any(e["event"] in ("weights", "alarm") for e in found) else []


@contextlib.asynccontextmanager
async def _house(options: WeightsOptions, model_dir: Path, folder: Path) -> AsyncIterator[_House]:
    port, gate_port, *desk_ports = free_ports(2 + len(options.stages))
    desks = {
        stages: f"tcp://127.0.0.1:{desk}"
        for stages, desk in zip(options.stages, desk_ports, strict=True)
    }
    job = LearnerJob(str(model_dir), str(folder / "weights"), desks, options.bucket)
    output = io.StringIO()
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        learner = stack.enter_context(LearnerProcess(job))
        ways: list[Publications] = [
            FolderPublications(WeightStore(folder / "weights", keep=options.rounds))
        ]
        for endpoint in desks.values():
            requester = await stack.enter_async_context(
                Requester(
                    endpoint,
                    name="engine-0",
                    owner="the learner",
                    hello=Hello(name="engine-0", run_id=RUN_ID),
                )
            )
            ways.append(
                BroadcastPublications(requester, engine="engine-0", tp=1, timeout_s=UPDATE_S)
            )
        keeper = GateKeeper(f"tcp://127.0.0.1:{gate_port}")
        stack.callback(keeper.shut)
        server = Server(_server_options(port, options.out / "sglang.log"), session)
        stack.push_async_callback(server.stop)
        host = Host(
            server=server,
            keeper=keeper,
            publications=_Arms(ways),
            rules=_rules(),
            base_dir=model_dir,
            evaluates=False,
            evaluates_base=False,
        )
        with contextlib.redirect_stdout(output):
            task = asyncio.create_task(host.run())
            try:
                yield _House(host, task, output, learner)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def _server_options(port: int, log_file: Path) -> ServerOptions:
    return ServerOptions(
        port=port,
        dtype="float32",
        context_length=512,
        max_total_tokens=4096,
        max_running_requests=8,
        prefill_chunk_tokens=1024,
        log_file=log_file,
    )


def _rules() -> HostRules:
    return HostRules(
        update_mode=UpdateMode.DRAIN,
        start_timeout_s=START_S,
        drain_timeout_s=UPDATE_S,
        update_timeout_s=UPDATE_S,
        eval_timeout_s=UPDATE_S,
        max_restarts=0,
        max_staleness=10**6,
        gap_alarm=GAP_ALARM,
    )
