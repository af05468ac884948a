"""The engine host: one supervised SGLang server, the gate before it, and the weights in it.

    publication -> verify manifest -> close gate -> drained -> flush -> load -> probe -> open gate    (drain)
    publication -> verify manifest -> close gate -> pause -> load -> resume -> probe -> open gate     (retract, in_place)

A paused server answers no probe, so requests that live through an update go on before the new weights are proven;
their clients take no such answer until the gate opens (`GateClient.stands_by`).

Waits, each with a deadline: for the server to start (`start_timeout_s`), for clients to drain (`drain_timeout_s`;
what still runs then is aborted), for each call of an update (`update_timeout_s`), for an evaluation
(`eval_timeout_s`), for a sign of life of a server that lets requests in (`hang_timeout_s`). A publication that fails its checks never reaches the server; without a good one inside the
staleness bound nobody could go on, so the host then ends with the reason. A server that dies, hangs, fails in an
update, or answers the probe as other weights would, is started again from the last folder that passed, and the
publication is tried again; one that is broadcast is sent again to a server that has begun with the initial model, behind a
closed gate, once the learner is there to send it. That also ends a pause: a server which failed in one may hold any weights, and must not
go on with them.
"""

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.engine.publications import Publications
from treepo_async.engine.server import Server
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.engine.vitals import Vitals
from treepo_async.errors import EngineError, WeightsError
from treepo_async.metrics.categories import ENGINE, EVALUATE, OTHER, Category
from treepo_async.metrics.events import emit
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.metrics.spans import span
from treepo_async.metrics.tell import Teller, telling
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import Manifest, Probe, TensorInfo, published_tensors

LOOK_S = 0.01
"""How often publications are looked at."""

BASE_VERSION = PolicyVersion(0, 0)

REFUSE_FACTOR = 100
"""A probe that differs by this many times `gap_alarm` was not answered by the published weights ..."""
REFUSE_NATS = 5.0
"""... and neither was one that differs by this, which is beyond what bfloat16 rounds."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostRules:
    """Deadlines and limits of a host."""

    update_mode: UpdateMode
    start_timeout_s: float
    drain_timeout_s: float
    update_timeout_s: float
    eval_timeout_s: float
    max_restarts: int
    """Without new weights in between."""
    max_staleness: int
    gap_alarm: float
    """Largest probe difference that passes without an alarm, in nats."""
    grows_trees: bool = True
    """False: only evaluations need this engine, so it passes over all other versions, and over refused ones."""
    dtype: str = "float32"
    """Of publications."""
    hang_timeout_s: float = 60.0
    """Without a sign of life a server is started again."""

    @property
    def gap_refused(self) -> float:
        """Probe difference beyond which weights are refused, in nats."""
        return max(self.gap_alarm, min(self.gap_alarm * REFUSE_FACTOR, REFUSE_NATS))


@dataclass
class Host:
    """Supervises one server; see the module."""

    server: Server
    keeper: GateKeeper
    publications: Publications
    rules: HostRules
    base_dir: Path
    """The initial model: policy version 0.0."""
    evaluates: bool
    """Whether versions marked for it are evaluated on this server, and so held."""
    evaluates_base: bool
    """Whether version 0.0 is marked: where a run begins, not where a host takes the place of another."""
    applied: PolicyVersion = BASE_VERSION
    refused: set[PolicyVersion] = field(default_factory=set)
    _proof: Probe | None = None
    """Of the applied weights; None for those of the initial model."""
    _base_checksum: str = ""
    """Of the initial model, as the server loaded it."""
    _is_behind: bool = False
    """The server came back with other weights than it had, and lets nobody in before it has the newest."""
    _was_held: bool = False
    """It then was kept at a version that was being evaluated."""
    _num_restarts: int = 0
    """Since weights were last applied."""

    def __post_init__(self) -> None:
        self._slot = Slot(SlotLedger(ENGINE), "server")
        self._vitals = Vitals(self.server, self.rules.hang_timeout_s, self._on_load)

    async def run(self) -> None:
        """Start the server and keep it and its weights current, for ever.

        Raises:
            EngineError: the server did not start, or died, hung or failed more than `max_restarts` times.
            WeightsError: no publication inside the staleness bound can be used.
        """
        start_s = await self.server.start(
            self.base_dir, str(self.applied), timeout_s=self.rules.start_timeout_s
        )
        self._base_checksum = await self.server.checksum(timeout_s=self.rules.update_timeout_s)
        teller = Teller(self._slot.ledger, "engine")
        async with telling(teller), asyncio.TaskGroup() as tasks:
            tasks.create_task(self.keeper.serve(), name="gate")
            await self._open(evaluate=self.evaluates and self.evaluates_base)
            emit("ready", url=self.server.url, start_s=start_s)
            tasks.create_task(self._vitals.watch(), name="vitals")
            tasks.create_task(self.publications.follow(), name="publications")
            tasks.create_task(self._follow_publications(), name="weights")

    async def _follow_publications(self) -> None:
        expected = published_tensors(self.base_dir, self.rules.dtype)
        while True:
            await asyncio.sleep(LOOK_S)
            await self._look_after_server()
            if self.keeper.is_held() and not self._is_behind:
                continue
            version = self._next_version()
            if version is None:
                continue
            try:
                with span("verify", Category.SYNC, track="verify", version=str(version)):
                    manifest = await self._verified(version, expected)
            except WeightsError as error:
                self._refuse(version, error)
                continue
            before = self.applied
            with self._slot("update", version=str(version)) as words:
                await self._apply(version, manifest)
                if self.applied != before:
                    # a later version may have taken the place of the one that was asked for
                    words["applied"] = str(self.applied)

    def _on_load(self, num_in_flight: int) -> None:
        self.keeper.tell_load(num_in_flight)
        if num_in_flight == 0:
            self._slot.rest(OTHER)
        else:
            self._slot.rest(EVALUATE if self.keeper.is_held() else "serve")

    async def _look_after_server(self) -> None:
        if not self.server.is_alive():
            await self._restart("SGLang died\n" + self.server.log_tail())
        elif self._vitals.hangs():
            await self._restart(
                f"SGLang hangs: no sign of life for {self.rules.hang_timeout_s:g} s (engine.hang_timeout_s)\n"
                + self.server.log_tail()
            )

    async def _verified(
        self, version: PolicyVersion, expected: Mapping[str, TensorInfo]
    ) -> Manifest:
        """`verify`, which takes long for a large model, while the server is looked after."""
        verification = asyncio.ensure_future(self.publications.verified(version, expected))
        while not verification.done():
            await asyncio.wait([verification], timeout=LOOK_S)
            await self._look_after_server()
        return verification.result()

    def _next_version(self) -> PolicyVersion | None:
        return self.publications.next_after(
            self.applied,
            refused=self.refused,
            # what was evaluated before a restart is not evaluated again
            evaluates=self.evaluates and (self._was_held or not self._is_behind),
            marked_only=not self.rules.grows_trees,
        )

    def _refuse(self, version: PolicyVersion, error: WeightsError) -> None:
        """Pass over a publication, unless no tree could be grown for the learner without it."""
        self.refused.add(version)
        if not (self.rules.grows_trees or self.publications.has(version)):
            # the learner did not wait for its evaluation, and has removed it
            return
        emit("alarm", alarm="publication refused", version=str(version), detail=str(error))
        is_needed = self.applied.step < version.step - self.rules.max_staleness
        if is_needed and self.rules.grows_trees:
            raise error

    async def _apply(self, version: PolicyVersion, manifest: Manifest) -> None:
        """Change the weights while nobody submits, and prove it."""
        begin = time.monotonic()
        await self.keeper.close()
        try:
            with self._slot.part("drain"):
                await self._make_way(version)
            drained = time.monotonic()
            with self._slot.part("load"):
                later = await self._load(version)
            if later is not None:
                version, manifest = PolicyVersion.parse(later.version), later
            loaded = time.monotonic()
            with self._slot.part("probe"):
                gap = await self._proven_gap(version, manifest.probe)
        except WeightsError as error:
            await self._let_be(version, error)
            return
        except EngineError as error:
            await self._undo(version, f"applying {version} failed: {error}")
            return
        self.applied, self._num_restarts, self._proof = version, 0, manifest.probe
        self._is_behind = self._was_held = False
        await self._open(evaluate=manifest.evaluate and self.evaluates)
        done = time.monotonic()
        emit(
            "weights",
            version=str(version),
            step=version.step,
            drain_s=drained - begin,
            load_s=loaded - drained,
            probe_s=done - loaded,
            pause_s=done - begin,
            publish_to_visible_s=self.publications.age_s(manifest),
            gap=gap,
        )
        await self.publications.loaded(version, "")

    async def _let_be(self, version: PolicyVersion, cause: WeightsError) -> None:
        """Go on with the weights that are there: the new ones were not begun with."""
        emit("alarm", alarm="an update was not begun", version=str(version), detail=str(cause))
        try:
            if self.rules.update_mode is not UpdateMode.DRAIN:
                await self.server.resume(timeout_s=self.rules.update_timeout_s)
        except EngineError as error:
            await self._undo(version, f"going on without {version} failed: {error}")
            return
        if not self._is_behind:
            await self._open(evaluate=False)
        # a learner that is gone lets this wait, and nobody else
        await self.publications.loaded(version, str(cause))

    async def _undo(self, version: PolicyVersion, cause: str) -> None:
        """Start the server again, and meanwhile tell the learner why."""
        telling = asyncio.create_task(self.publications.loaded(version, cause), name="telling")
        try:
            await self._restart(cause)
            await telling
        finally:
            telling.cancel()

    async def _make_way(self, version: PolicyVersion) -> None:
        """Leave no request running: ended (`DRAIN`) or paused."""
        limit_s = self.rules.update_timeout_s
        if self.rules.update_mode is UpdateMode.DRAIN:
            await self._drain(version)
            await self.server.flush_cache(timeout_s=limit_s)
        else:
            await self.server.pause(self.rules.update_mode.value, timeout_s=limit_s)

    async def _load(self, version: PolicyVersion) -> Manifest | None:
        """See `Publications.load`."""
        mode, limit_s = self.rules.update_mode, self.rules.update_timeout_s
        later = await self.publications.load(
            self.server, version, flush=mode is not UpdateMode.IN_PLACE, timeout_s=limit_s
        )
        if mode is not UpdateMode.DRAIN:
            await self.server.resume(timeout_s=limit_s)
        return later

    async def _drain(self, version: PolicyVersion) -> None:
        if await self.keeper.drained(timeout_s=self.rules.drain_timeout_s):
            return
        emit("alarm", alarm="drain timed out, running requests aborted", version=str(version))
        await self.server.post("/abort_request", {"rid": "", "abort_all": True}, timeout_s=10)

    async def _proven_gap(self, version: PolicyVersion, probe: Probe) -> float:
        """Largest difference between the engine's and the learner's log-probs of the probe, in nats.

        Raises:
            EngineError: it is too large to be rounding, or no number.
        """
        found = await self.server.score(probe.token_ids, timeout_s=self.rules.update_timeout_s)
        engine = np.array([x for logprobs in found for x in logprobs], dtype=np.float64)
        learner = np.array([x for logprobs in probe.logprobs for x in logprobs])
        gap = float(np.abs(engine - learner).max()) if len(engine) == len(learner) else math.inf
        limit = self.rules.gap_refused
        # written so that NaN is above everything
        if not gap <= limit:
            raise EngineError(f"the probe differs by {gap:.3g} nats, more than {limit:.3g}")
        if gap > self.rules.gap_alarm:
            emit(
                "alarm",
                alarm="engine and learner differ on the probe",
                version=str(version),
                gap=gap,
            )
        return gap

    async def _restart(self, cause: str) -> None:
        """Start the server again with the last weights that passed, behind a closed gate."""
        with self._slot("restart", cause=next(iter(cause.splitlines()), "")[:200]):
            await self._restart_until_it_runs(cause)

    async def _restart_until_it_runs(self, cause: str) -> None:
        held = self.applied if self.keeper.is_held() else None
        self._vitals.end()
        await self.keeper.close(is_down=True)
        while True:
            self._num_restarts += 1
            if self._num_restarts > self.rules.max_restarts:
                raise EngineError(f"gave up after {self.rules.max_restarts} restarts: {cause}")
            emit("alarm", alarm="engine restarted", version=str(self.applied), detail=cause)
            try:
                await self._start_again()
                break
            except EngineError as error:
                cause = str(error)
        if self._is_behind:
            self._was_held = self._was_held or held is not None
            return
        await self._open(evaluate=self.applied == held)

    async def _start_again(self) -> None:
        await self.server.stop()
        if self.applied != BASE_VERSION and not self.publications.survives_restarts:
            self.applied, self._proof, self._is_behind = BASE_VERSION, None, True
        elif self.applied != BASE_VERSION and not self.publications.has(self.applied):
            # with several engines the learner publishes on while an evaluation holds this one back
            self.applied, self._proof = BASE_VERSION, None
        is_base = self.applied == BASE_VERSION
        folder = self.base_dir if is_base else self.publications.folder_of(self.applied)
        await self.server.start(folder, str(self.applied), timeout_s=self.rules.start_timeout_s)
        if self._proof is not None:
            await self._proven_gap(self.applied, self._proof)
            return
        checksum = await self.server.checksum(timeout_s=self.rules.update_timeout_s)
        if checksum != self._base_checksum:
            raise EngineError(f"{folder} gave other weights than before ({checksum})")

    async def _open(self, *, evaluate: bool) -> None:
        self._vitals.begin()
        await self.keeper.open(self.applied, evaluate=evaluate, hold_s=self.rules.eval_timeout_s)
