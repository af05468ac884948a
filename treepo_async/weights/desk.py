"""What the learner offers to engines, and what its pipeline stages are to send to whom. Pure: no sockets, no clock, no tensors.

    host: AskWeights -> offer ... gate closed, SGLang waits ... TakeWeights -> one order a stage, groups -> WeightsTaken
    stage: AskSend -> order -> broadcast -> WeightsSent

Neighbours: `learner.broadcast_desk` serves it over a socket, `engine.broadcast` is the host's side, `learner.broadcast_sender` the
stages'.

Invariants: an engine has groups of its own, so what becomes of one engine is nobody else's matter. A group that a transfer failed in, or
that a server of an earlier start had joined, is never used again. Of the offers only the newest is kept, the newest marked ones, and
those that somebody is being sent. What is offered can be sent: a version is withdrawn before its tensors go.
"""

from collections import defaultdict, deque
from collections.abc import Collection
from dataclasses import dataclass, field

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.parcel import Parcel
from treepo_async.wire.messages import SendWeights, WeightsGroup


@dataclass(frozen=True, slots=True)
class Place:
    """Where the groups of a stage meet."""

    address: str
    port: int


@dataclass(slots=True)
class _Engine:
    """What is known of an engine."""

    server: str = ""
    tp: int = 0
    num_groups: int = 0
    """That were made for it, by which they are named."""
    version: PolicyVersion | None = None
    """That is being sent."""
    is_broken: bool = False
    """A transfer failed since the groups were named."""


@dataclass(slots=True)
class _Offer:
    parcel: Parcel
    data: bytes


@dataclass
class Desk:
    """See the module."""

    name: str
    """No other desk has it; a prefix of the names of groups."""
    num_stages: int
    keep_marked: int
    """Newest versions to be evaluated that are kept beside the newest of all."""
    _offers: dict[PolicyVersion, _Offer] = field(default_factory=dict)
    _engines: dict[str, _Engine] = field(default_factory=dict)
    _places: dict[int, Place] = field(default_factory=dict)
    _orders: defaultdict[int, deque[SendWeights]] = field(
        default_factory=lambda: defaultdict(deque)
    )
    _num_orders: int = 0

    def offer(self, parcel: Parcel) -> None:
        """From now on engines may have this version, instead of the newest so far."""
        self._keep(self._wanted())
        self._offers[parcel.version] = _Offer(parcel, parcel.to_bytes())

    def withdraw_old(self) -> list[PolicyVersion]:
        """Before a version is copied: offer no more what the newest has taken the place of. Gives those whose tensors must stay.

        The newest stays on offer until `offer`: an engine that was offered it may ask for it meanwhile.
        """
        self._keep({*self._wanted(), *sorted(self._offers)[-1:]})
        return sorted(self._offers)

    def next_for(
        self,
        applied: PolicyVersion,
        *,
        refused: Collection[str] = (),
        evaluates: bool = False,
        marked_only: bool = False,
    ) -> bytes | None:
        """The parcel that an engine shall have next, as bytes; None where it has the newest.

        Args:
            applied: what it has. After a learner went back, engines keep newer steps until these are reached again.
            refused: versions that it will not take.
            evaluates: whether it must see each marked version.
            marked_only: whether it wants no others.
        """
        newer = [
            version
            for version in sorted(self._offers)
            if version > applied and version.step >= applied.step and str(version) not in refused
        ]
        marked = [v for v in newer if self._offers[v].parcel.manifest.evaluate]
        if evaluates and marked:
            return self._offers[marked[0]].data
        return self._offers[newer[-1]].data if newer and not marked_only else None

    def take(
        self, engine: str, version: PolicyVersion, *, server: str, tp: int
    ) -> list[WeightsGroup] | None:
        """Order every stage to send a version. Gives the groups; None while a stage has not yet come.

        Args:
            engine: who takes it.
            version: which.
            server: see `TakeWeights`.
            tp: ranks of the engine.

        Raises:
            WeightsError: the version is not offered any more.
        """
        if version not in self._offers:
            raise WeightsError(f"version {version} is not offered any more")
        if len(self._places) < self.num_stages:
            return None
        found = self._engines.setdefault(engine, _Engine())
        is_again = found.version is not None
        if is_again or found.is_broken or (found.server, found.tp) != (server, tp):
            # a transfer that is asked for anew was given up by the host, whatever became of it
            found.num_groups += 1
        found.server, found.tp, found.version, found.is_broken = server, tp, version, False
        names = [f"{self.name}.{engine}.{found.num_groups}.{s}" for s in range(self.num_stages)]
        for stage, name in enumerate(names):
            self._order(stage, engine, name, tp + 1, version)
        places = [self._places[stage] for stage in range(self.num_stages)]
        return [
            WeightsGroup(name, place.address, place.port)
            for name, place in zip(names, places, strict=True)
        ]

    def taken(self, engine: str, *, ok: bool) -> None:
        """The engine has what it was sent, or has given up."""
        found = self._engines.setdefault(engine, _Engine())
        found.version, found.is_broken = None, found.is_broken or not ok

    def sent(self, engine: str, group: str, *, ok: bool) -> None:
        """A stage has carried out an order, or could not."""
        found = self._engines.get(engine)
        if (
            found is not None
            and not ok
            and group.startswith(f"{self.name}.{engine}.{found.num_groups}.")
        ):
            found.is_broken = True

    def stage_is_at(self, stage: int, place: Place) -> None:
        """The sender of a stage is there."""
        self._places[stage] = place

    def next_order(self, stage: int, *, done: int) -> SendWeights | None:
        """The first order of a stage behind those that it has begun; it is kept until the stage says that it has begun it."""
        orders = self._orders[stage]
        while orders and orders[0].order <= done:
            orders.popleft()
        return orders[0] if orders else None

    def _wanted(self) -> set[PolicyVersion]:
        """Versions that stay on offer beside the newest."""
        marked = sorted(v for v, found in self._offers.items() if found.parcel.manifest.evaluate)
        under_way = {e.version for e in self._engines.values() if e.version is not None}
        return {*marked[len(marked) - min(self.keep_marked, len(marked)) :], *under_way}

    def _keep(self, versions: set[PolicyVersion]) -> None:
        self._offers = {v: found for v, found in self._offers.items() if v in versions}

    def _order(
        self, stage: int, engine: str, group: str, ranks: int, version: PolicyVersion
    ) -> None:
        self._num_orders += 1
        self._orders[stage].append(
            SendWeights(
                order=self._num_orders,
                engine=engine,
                group=group,
                ranks=ranks,
                lineage=version.lineage,
                step=version.step,
            )
        )
