"""The host's side of a broadcast: hear of versions, have the learner send one, and have SGLang take it.

    AskWeights -> offer, checked ... gate closed, SGLang waits ... TakeWeights -> the stages begin to send
    -> SGLang joins their groups, once -> begin, every bucket of every stage, end -> probe -> WeightsTaken

Waits: for an offer (`ASK_S` at a time, for ever; the learner ends it), for the learner to tell its stages (`timeout_s`), and for
SGLang to take everything (`timeout_s` in all). A sender that does not come freezes SGLang: then the deadline passes, and the host kills
it and starts it anew.

Invariant: SGLang is asked for nothing before the senders have been told to send, and for no bucket that the parcel does not name. After
a failure its weights may be a mixture, which only a new start undoes.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from treepo_async.engine.server import Server
from treepo_async.errors import DeadlineError, EngineError, RefusedError, TreepoError, WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import Manifest, TensorInfo
from treepo_async.weights.parcel import TORCH_DTYPES, Bucket, Parcel
from treepo_async.wire.messages import (
    AskWeights,
    Message,
    TakeWeights,
    WeightsComing,
    WeightsOffer,
    WeightsTaken,
)
from treepo_async.wire.refusals import Answer
from treepo_async.wire.sockets import Requester

ASK_S = 2.0
"""An offer is waited for so long at a time."""
ANSWER_S = 10.0
RETRY_S = 0.5

log = logging.getLogger(__name__)


class BroadcastPublications:
    """See the module; `follow` must run beside the host, inside of `async with requester`."""

    def __init__(
        self,
        requester: Requester,
        *,
        engine: str,
        tp: int,
        timeout_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare.

        Args:
            requester: to the learner's desk.
            engine: name of the host.
            tp: ranks of its server.
            timeout_s: of a whole transfer.
            clock: of this machine, in seconds.
        """
        self._requester, self._engine, self._tp = requester, engine, tp
        self._timeout_s, self._clock = timeout_s, clock
        self._wish: AskWeights | None = None
        self._changed = asyncio.Event()
        self._offer: Parcel | None = None
        self._expected: Mapping[str, TensorInfo] = {}
        """Tensors of the model."""
        self._clock_ahead_s, self._best_round_s = 0.0, float("inf")
        """How far the learner's clock is ahead, and the round trip of the exchange that told so."""

    @property
    def survives_restarts(self) -> bool:
        """See `Publications`."""
        return False

    async def follow(self) -> None:
        """Ask for what the host wants next, for ever."""
        while True:
            wish = self._wish
            if wish is None or self._offer is not None:
                self._changed.clear()
                await self._changed.wait()
                continue
            try:
                answer, attachment = await self._requester.ask(
                    wish, timeout_s=ASK_S + ANSWER_S, wait="an offer of weights"
                )
                if isinstance(answer, WeightsOffer) and wish == self._wish:
                    self._offer = Parcel.parse(bytes(attachment[0]))
            except TreepoError as error:
                # a learner that is started again is asked again, and its end is the driver's matter
                log.warning("no offer of weights: %s", error)
                await asyncio.sleep(RETRY_S)

    def next_after(
        self,
        applied: PolicyVersion,
        *,
        refused: Collection[PolicyVersion],
        evaluates: bool,
        marked_only: bool,
    ) -> PolicyVersion | None:
        """See `Publications`; what is offered by now."""
        wish = AskWeights(
            engine=self._engine,
            lineage=applied.lineage,
            step=applied.step,
            refused=sorted(map(str, refused)),
            evaluates=evaluates,
            marked_only=marked_only,
            wait_s=ASK_S,
        )
        if wish != self._wish:
            self._wish, self._offer = wish, None
            self._changed.set()
        return None if self._offer is None else self._offer.version

    def has(self, version: PolicyVersion) -> bool:
        """See `Publications`."""
        return self._offer is not None and self._offer.version == version

    async def verified(
        self, version: PolicyVersion, expected: Mapping[str, TensorInfo]
    ) -> Manifest:
        """See `Publications`; the tensors themselves are proven once they are in the engine."""
        parcel = self._offered(version)
        parcel.check(expected)
        self._expected = expected
        return parcel.manifest

    async def load(
        self, server: Server, version: PolicyVersion, *, flush: bool, timeout_s: float
    ) -> Manifest | None:
        """See `Publications`; the deadline is that of the transfer."""
        offered = self._offered(version)
        try:
            parcel, coming = await self._order(server, offered)
        except (DeadlineError, RefusedError) as error:
            raise WeightsError(f"version {version} is not sent: {error}") from error
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._take(server, parcel, coming, flush=flush)
        except TimeoutError as error:
            raise EngineError(
                f"the broadcast of {version} was not over after {self._timeout_s:g} s (weights.timeout_s)"
            ) from error
        return None if parcel is offered else parcel.manifest

    async def loaded(self, version: PolicyVersion, error: str) -> None:
        """See `Publications`."""
        self._offer = None
        self._wish = None
        taken = WeightsTaken(
            engine=self._engine, lineage=version.lineage, step=version.step, error=error[:500]
        )
        try:
            await self._ask(taken, "the learner to note what the engine has")
        except TreepoError as caught:
            # a learner that does not hear of it makes groups anew
            log.warning("%s", caught)

    def folder_of(self, version: PolicyVersion) -> Path:
        """See `Publications`."""
        raise WeightsError(f"version {version} is in no folder")

    def age_s(self, manifest: Manifest) -> float:
        """See `Publications`; by the learner's clock as the last exchange with it told it, within half of its round trip."""
        return self._clock() + self._clock_ahead_s - manifest.published_at

    async def _order(self, server: Server, parcel: Parcel) -> tuple[Parcel, WeightsComing]:
        """Have the stages send what was offered, or what has taken its place by now."""
        while True:
            try:
                return parcel, await self._coming(server, parcel.version)
            except RefusedError as error:
                log.info("%s: a later version is asked for", error)
            parcel = await self._later(parcel.version)

    async def _later(self, version: PolicyVersion) -> Parcel:
        assert self._wish is not None, "a version is loaded that was asked for"
        answer, attachment = await self._ask(self._wish, "an offer of weights")
        if not isinstance(answer, WeightsOffer):
            raise WeightsError(f"version {version} is not offered any more, and no other is")
        parcel = Parcel.parse(bytes(attachment[0]))
        parcel.check(self._expected)
        return parcel

    async def _coming(self, server: Server, version: PolicyVersion) -> WeightsComing:
        take = TakeWeights(
            engine=self._engine,
            lineage=version.lineage,
            step=version.step,
            server=server.incarnation,
            tp=self._tp,
        )
        begin = self._clock()
        answer, _ = await self._ask(take, "the learner to send weights")
        if not isinstance(answer, WeightsComing):
            raise WeightsError(f"the learner answered {type(answer).__name__} to TakeWeights")
        self._set_clock(answer.clock, begin, self._clock())
        return answer

    async def _take(
        self, server: Server, parcel: Parcel, coming: WeightsComing, *, flush: bool
    ) -> None:
        limit_s, version = self._timeout_s, parcel.version
        for group in coming.groups:
            if group.name not in server.groups:
                await server.join_group(
                    group.name, group.address, group.port, tp=self._tp, timeout_s=limit_s
                )
        await server.begin_update(timeout_s=limit_s)
        buckets = [
            (group.name, bucket)
            for group, stage in zip(coming.groups, parcel.stages, strict=True)
            for bucket in stage
        ]
        for number, (name, bucket) in enumerate(buckets, start=1):
            is_last = number == len(buckets)
            await server.receive_bucket(
                name,
                *_described(bucket, parcel.manifest.tensors),
                weight_version=str(version) if is_last else None,
                flush=flush and is_last,
                timeout_s=limit_s,
            )
        await server.end_update(timeout_s=limit_s)

    def _set_clock(self, learners: float, begin: float, end: float) -> None:
        round_s = end - begin
        if round_s <= 2 * self._best_round_s:
            # a slower exchange says less of the clock, but clocks drift: one about as fast replaces it
            self._best_round_s = min(round_s, self._best_round_s)
            self._clock_ahead_s = learners - (begin + end) / 2

    async def _ask(self, message: Message, wait: str) -> Answer:
        return await self._requester.ask(message, timeout_s=ANSWER_S, wait=wait)

    def _offered(self, version: PolicyVersion) -> Parcel:
        if self._offer is None or self._offer.version != version:
            raise WeightsError(f"version {version} is not offered")
        return self._offer


def _described(
    bucket: Bucket, tensors: Mapping[str, TensorInfo]
) -> tuple[list[str], list[str], list[list[int]]]:
    """Names, dtypes and shapes of a bucket's tensors, in the order of their bytes."""
    infos = [tensors[name] for name in bucket]
    return (
        list(bucket),
        [TORCH_DTYPES[info.dtype] for info in infos],
        [list(info.shape) for info in infos],
    )
