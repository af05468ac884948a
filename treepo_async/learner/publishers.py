"""The ways a version gets from the learner to the engines: a folder that they load (`weights.transport=disk`), or a broadcast.

Neighbours: `worker` publishes, `publish` writes the folder, `broadcast_desk` offers what is broadcast. Waits: see `publish`.
"""

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from treepo_async.learner.publish import TRACK, probe_of, publish, when_there_is_room
from treepo_async.metrics.categories import Category
from treepo_async.metrics.spans import span
from treepo_async.types import Float32, Int32, PolicyVersion
from treepo_async.weights.manifest import Manifest
from treepo_async.weights.parcel import Parcel, StagePart
from treepo_async.weights.store import WeightStore

Result = TypeVar("Result")


class Team(Protocol):
    """What a publication asks of all ranks; see `team.Team`."""

    def score(self, sequences: Sequence[Int32]) -> list[Float32]:
        """Log-probs of each token but the first, at temperature 1."""

    def export(self) -> Iterator[tuple[str, Any]]:
        """Full HF tensors by name."""

    def keep_waiting(self, work: Callable[[], Result]) -> Result:
        """Do what concerns rank 0 alone."""


class BroadcastTeam(Team, Protocol):
    """What a broadcast asks besides."""

    def offer(
        self, version: PolicyVersion, dtype: str, keep: Collection[PolicyVersion]
    ) -> list[StagePart]:
        """Copy the weights of every stage."""


class Desk(Protocol):
    """See `broadcast_desk.DeskThread`."""

    def offer(self, parcel: Parcel) -> None:
        """From now on engines may have this version."""

    def withdraw_old(self) -> list[PolicyVersion]:
        """Offer no more what need not stay beside a version that comes next. Gives those whose copies must stay."""


class Publisher(Protocol):
    """Gives engines the current weights."""

    def publish(
        self, version: PolicyVersion, sequences: Sequence[Int32], *, evaluate: bool
    ) -> None:
        """Publish the current weights under a version that was never published.

        Args:
            version: of the weights.
            sequences: [T] each, for the probe.
            evaluate: whether the version shall be evaluated.

        Raises:
            WeightsError: it cannot be written, or another learner has taken this one's place.
        """

    def begin(self, version: PolicyVersion, sequences: Sequence[Int32]) -> None:
        """Have engines that start from now on get the weights that a learner goes on from, where a folder does not have them."""


@dataclass(frozen=True, slots=True)
class FolderPublisher:
    """Writes a folder with the tensors."""

    store: WeightStore
    team: Team
    dtype: torch.dtype
    config_file: Path
    timeout_s: float
    """How long the disk may refuse."""

    def publish(
        self, version: PolicyVersion, sequences: Sequence[Int32], *, evaluate: bool
    ) -> None:
        """See `Publisher`."""
        publishing = partial(
            publish,
            self.store,
            self.team,
            version,
            sequences,
            dtype=self.dtype,
            config_file=self.config_file,
            evaluate=evaluate,
            apart=self.team.keep_waiting,
        )
        when_there_is_room(publishing, timeout_s=self.timeout_s, apart=self.team.keep_waiting)

    def begin(self, version: PolicyVersion, sequences: Sequence[Int32]) -> None:
        """The folder has what engines were given before."""


@dataclass(frozen=True, slots=True)
class BroadcastPublisher:
    """Has every stage keep a copy, and offers it; the folder has the manifest alone."""

    store: WeightStore
    team: BroadcastTeam
    desk: Desk
    dtype: torch.dtype
    timeout_s: float
    """How long the disk may refuse."""

    def publish(
        self, version: PolicyVersion, sequences: Sequence[Int32], *, evaluate: bool
    ) -> None:
        """See `Publisher`."""
        parcel = self._parcel(version, sequences, evaluate=evaluate)
        when_there_is_room(
            partial(self.store.note, version, parcel.manifest),
            timeout_s=self.timeout_s,
            apart=self.team.keep_waiting,
        )
        self.desk.offer(parcel)

    def begin(self, version: PolicyVersion, sequences: Sequence[Int32]) -> None:
        """See `Publisher`; such weights have no place in the folder, as they are published under an earlier name there."""
        self.desk.offer(self._parcel(version, sequences, evaluate=False))

    def _parcel(
        self, version: PolicyVersion, sequences: Sequence[Int32], *, evaluate: bool
    ) -> Parcel:
        published_at = time.time()
        with span("copy", Category.SYNC, track=TRACK, version=str(version)):
            dtype = str(self.dtype).removeprefix("torch.")
            parts = self.team.offer(version, dtype, self.desk.withdraw_old())
        manifest = Manifest(
            version=str(version),
            tensors={name: info for part in parts for name, info in part.tensors.items()},
            # an engine gives nobody the bytes that it took: the probe is the proof
            hashes={},
            probe=probe_of(self.team, sequences),
            evaluate=evaluate,
            published_at=published_at,
        )
        return Parcel(manifest, tuple(part.buckets for part in parts))
