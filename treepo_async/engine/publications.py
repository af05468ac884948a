"""Where a host gets weights from: the folder that the learner writes (`weights.transport=disk`), or the learner by a broadcast.

Neighbours: `host` closes the gate, has weights loaded and proven; `broadcast` is the other implementation.
"""

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from treepo_async.engine.server import Server
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import Manifest, TensorInfo, verify
from treepo_async.weights.store import WeightStore


class Publications(Protocol):
    """What a host asks of them."""

    @property
    def survives_restarts(self) -> bool:
        """Whether a server can be started with a version; else it starts with the initial model and is sent the newest again."""

    async def follow(self) -> None:
        """Learn of versions, for ever; runs beside the host."""

    def next_after(
        self,
        applied: PolicyVersion,
        *,
        refused: Collection[PolicyVersion],
        evaluates: bool,
        marked_only: bool,
    ) -> PolicyVersion | None:
        """The version to apply next.

        Args:
            applied: what the engine has.
            refused: passed over.
            evaluates: none to be evaluated is passed over.
            marked_only: only these come next.
        """

    def has(self, version: PolicyVersion) -> bool:
        """Whether it can still be had."""

    async def verified(
        self, version: PolicyVersion, expected: Mapping[str, TensorInfo]
    ) -> Manifest:
        """Check a version before the engine is asked for anything.

        Raises:
            WeightsError: it is not what the model needs, or is damaged.
        """

    async def load(
        self, server: Server, version: PolicyVersion, *, flush: bool, timeout_s: float
    ) -> Manifest | None:
        """Have a server without requests, or one that is paused, load a version that was verified.

        Returns:
            The manifest of a later one that had taken its place, and was loaded instead; else None.

        Raises:
            WeightsError: the server was not asked for anything: it has what it had.
            EngineError: it did not, and may hold any weights.
        """

    async def loaded(self, version: PolicyVersion, error: str) -> None:
        """The version was loaded and proven, or not, and why."""

    def folder_of(self, version: PolicyVersion) -> Path:
        """Where a server can be started with it, where it survives restarts."""

    def age_s(self, manifest: Manifest) -> float:
        """Seconds since the learner began to publish."""


@dataclass(frozen=True, slots=True)
class FolderPublications:
    """Publications in a folder that host and learner share."""

    store: WeightStore

    @property
    def survives_restarts(self) -> bool:
        """See `Publications`."""
        return True

    async def follow(self) -> None:
        """The folder is looked at whenever it is asked for a version."""

    def next_after(
        self,
        applied: PolicyVersion,
        *,
        refused: Collection[PolicyVersion],
        evaluates: bool,
        marked_only: bool,
    ) -> PolicyVersion | None:
        """See `Publications`."""
        if evaluates:
            return self.store.next_after(applied, without=refused, marked_only=marked_only)
        newer = set(self.store.versions()) - set(refused)
        newest = max(newer, default=applied)
        return newest if newest > applied else None

    def has(self, version: PolicyVersion) -> bool:
        """See `Publications`."""
        return self.store.path(version).exists()

    async def verified(
        self, version: PolicyVersion, expected: Mapping[str, TensorInfo]
    ) -> Manifest:
        """See `Publications`; reads all of it, in a thread."""
        return await asyncio.to_thread(verify, self.store.path(version), expected)

    async def load(
        self, server: Server, version: PolicyVersion, *, flush: bool, timeout_s: float
    ) -> Manifest | None:
        """See `Publications`; a folder that goes meanwhile is a failure."""
        await server.load_weights(
            self.store.path(version), str(version), timeout_s=timeout_s, flush=flush
        )
        return None

    async def loaded(self, version: PolicyVersion, error: str) -> None:
        """Nobody waits to hear of it."""

    def folder_of(self, version: PolicyVersion) -> Path:
        """See `Publications`."""
        return self.store.path(version)

    def age_s(self, manifest: Manifest) -> float:
        """See `Publications`; on one machine, or where clocks agree."""
        return time.time() - manifest.published_at
