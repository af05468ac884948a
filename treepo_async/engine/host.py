"""The engine host: one supervised SGLang server, the gate before it, and the weights in it.

    publication -> verify manifest -> close gate -> drained -> flush -> load -> probe -> open gate

Waits, each with a deadline: for the server to start (`start_timeout_s`), for clients to drain (`drain_timeout_s`;
what still runs then is aborted), for the load and the probe (`update_timeout_s`), for an evaluation
(`eval_timeout_s`). A publication that fails its checks never reaches the server; a server that dies, or that
answers the probe wrongly, is started again from the last folder that passed, and the publication is tried again.
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np

from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.server import Server
from treepo_async.errors import EngineError, WeightsError
from treepo_async.metrics.events import emit
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import Manifest, Probe, model_tensors, verify
from treepo_async.weights.store import WeightStore

LOOK_S = 0.05
"""How often the store is looked at."""
SAMPLE_S = 0.25
"""How often the server is asked whether it is idle."""
SAMPLES_PER_EVENT = 4

BASE_VERSION = PolicyVersion(0, 0)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostRules:
    """Deadlines and limits of a host."""

    start_timeout_s: float
    drain_timeout_s: float
    update_timeout_s: float
    eval_timeout_s: float
    max_restarts: int
    gap_alarm: float
    """Largest probe difference that passes, in nats."""


@dataclass
class Host:
    """Supervises one server; see the module."""

    server: Server
    keeper: GateKeeper
    store: WeightStore
    rules: HostRules
    base_dir: Path
    """The initial model: policy version 0.0."""
    evaluate_first: bool
    """Whether version 0.0 is evaluated."""
    applied: PolicyVersion = BASE_VERSION
    refused: set[PolicyVersion] = field(default_factory=set)
    _num_restarts: int = 0

    async def run(self) -> None:
        """Start the server and keep it and its weights current, for ever.

        Raises:
            EngineError: the server died more than `max_restarts` times.
        """
        start_s = await self.server.start(
            self.base_dir, str(self.applied), timeout_s=self.rules.start_timeout_s
        )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.keeper.serve(), name="gate")
            await self._open(evaluate=self.evaluate_first)
            emit("ready", url=self.server.url, start_s=start_s)
            tasks.create_task(self._sample_idleness(), name="idleness")
            tasks.create_task(self._follow_store(), name="weights")

    async def _follow_store(self) -> None:
        expected = model_tensors(self.base_dir)
        while True:
            await asyncio.sleep(LOOK_S)
            if not self.server.is_alive():
                await self._restart("SGLang died\n" + self.server.log_tail())
            version = self.store.next_after(max([self.applied, *self.refused]))
            if version is None or self.keeper.is_held():
                continue
            try:
                manifest = await asyncio.to_thread(verify, self.store.path(version), expected)
            except WeightsError as error:
                self.refused.add(version)
                emit("alarm", alarm="publication refused", version=str(version), detail=str(error))
                continue
            await self._apply(version, manifest)

    async def _apply(self, version: PolicyVersion, manifest: Manifest) -> None:
        """Change the weights between two requests, and prove it."""
        begin = time.monotonic()
        await self.keeper.close()
        if not await self.keeper.drained(timeout_s=self.rules.drain_timeout_s):
            emit("alarm", alarm="drain timed out, running requests aborted", version=str(version))
            await self.server.post("/abort_request", {"rid": "", "abort_all": True}, timeout_s=10)
        drained = time.monotonic()
        try:
            await self.server.flush_cache(timeout_s=self.rules.update_timeout_s)
            await self.server.load_weights(
                self.store.path(version), str(version), timeout_s=self.rules.update_timeout_s
            )
            loaded = time.monotonic()
            gap = await self._proven_gap(manifest.probe)
        except EngineError as error:
            await self._restart(f"applying {version} failed: {error}")
            return
        self.applied = version
        await self._open(evaluate=manifest.evaluate)
        done = time.monotonic()
        emit(
            "weights",
            version=str(version),
            step=version.step,
            drain_s=drained - begin,
            load_s=loaded - drained,
            probe_s=done - loaded,
            pause_s=done - begin,
            gap=gap,
        )

    async def _proven_gap(self, probe: Probe) -> float:
        """Largest difference between the engine's and the learner's log-probs of the probe, in nats.

        Raises:
            EngineError: it is above `gap_alarm` or no number.
        """
        found = await self.server.score(probe.token_ids, timeout_s=self.rules.update_timeout_s)
        engine = np.array([x for logprobs in found for x in logprobs], dtype=np.float64)
        learner = np.array([x for logprobs in probe.logprobs for x in logprobs])
        gap = float(np.abs(engine - learner).max()) if len(engine) == len(learner) else math.inf
        # written so that NaN is above everything
        if not gap <= self.rules.gap_alarm:
            raise EngineError(f"the probe differs by {gap:.3g} nats, allowed: metrics.gap_alarm")
        return gap

    async def _restart(self, cause: str) -> None:
        """Start the server again with the last weights that passed, behind a closed gate."""
        self._num_restarts += 1
        if self._num_restarts > self.rules.max_restarts:
            raise EngineError(f"gave up after {self.rules.max_restarts} restarts: {cause}")
        emit("alarm", alarm="engine restarted", version=str(self.applied), detail=cause)
        await self.keeper.close()
        await self.server.stop()
        folder = self.store.path(self.applied) if self.applied.step else self.base_dir
        await self.server.start(folder, str(self.applied), timeout_s=self.rules.start_timeout_s)
        await self._open(evaluate=False)

    async def _open(self, *, evaluate: bool) -> None:
        await self.keeper.open(self.applied, evaluate=evaluate, hold_s=self.rules.eval_timeout_s)

    async def _sample_idleness(self) -> None:
        """Tell the driver, once a second, in how many samples the server had nothing to do."""
        while True:
            num_idle = 0
            for _ in range(SAMPLES_PER_EVENT):
                await asyncio.sleep(SAMPLE_S)
                try:
                    num_idle += await self.server.is_idle()
                except (aiohttp.ClientError, TimeoutError):
                    log.warning("no load report from SGLang")
            emit("engine", num_samples=SAMPLES_PER_EVENT, num_idle=num_idle)
