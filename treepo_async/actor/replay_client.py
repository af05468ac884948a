"""What an actor asks of replay: a lease, and to take its tree.

Waits: for an answer to each request (replay; `reply_timeout_s`). A replay that still answers heartbeats but cannot do what
it was asked for, as with a full disk, is waited for without end: it says itself what it lacks.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence

import numpy as np

from treepo_async.errors import DeadlineError, RefusedError, WireError
from treepo_async.types import Prompt, Tree
from treepo_async.wire.codec import decode_tree, digest_of, encode_tree
from treepo_async.wire.messages import (
    LEFT,
    AskLease,
    Beat,
    Beating,
    GiveUp,
    Hello,
    Leased,
    Message,
    NoLease,
    PutTree,
    Refusal,
)
from treepo_async.wire.sockets import Requester

LEASE_WAIT_S = 5.0
"""Replay answers within this time, if only to say why there is no lease."""
SILENT_S = 10.0
"""A replay that has not answered a heartbeat for this long is silent."""

LOST = (Refusal.STALE, Refusal.UNKNOWN_LEASE, Refusal.ROLLED_BACK)
"""A tree refused for one of these is dropped: another attempt made it, it came too late, or its weights are no more."""
POOR = (Refusal.INVALID, Refusal.OVERSIZE, Refusal.FUTURE_VERSION)
"""A tree refused for one of these is one that this actor should not have made."""

log = logging.getLogger(__name__)


class ReplayClient:
    """Requests of one actor."""

    def __init__(
        self,
        requester: Requester,
        *,
        reply_timeout_s: float = 60.0,
        max_tree_bytes: int | None = None,
    ) -> None:
        """Prepare.

        Args:
            requester: connected to replay, with the greeting of this actor.
            reply_timeout_s: longest wait for an answer; a replay that was killed must be able to start within it.
            max_tree_bytes: larger trees are not sent.
        """
        self._replay, self._reply_timeout_s = requester, reply_timeout_s
        self._max_tree_bytes = max_tree_bytes
        self._heard_at = -np.inf

    async def hello(self, hello: Hello, *, timeout_s: float) -> None:
        """Introduce this actor; waits until replay is up.

        Raises:
            RefusedError: replay belongs to another run.
            DeadlineError: replay did not come up.
        """
        await self._replay.ask(hello, timeout_s=timeout_s, wait="replay to come up")

    async def lease(self) -> tuple[Leased, Tree | None] | None:
        """A prompt, waited for as long as it takes, and an old tree of it if replay has one; None when there will be none."""
        while True:
            answer, attachment = await self._ask(AskLease(wait_s=LEASE_WAIT_S))
            if isinstance(answer, Leased):
                return answer, _old_tree(attachment)
            if not isinstance(answer, NoLease):
                raise WireError(f"AskLease was answered by {type(answer).__name__}")
            if answer.final:
                return None

    async def put(self, lease: Leased, tree: Tree) -> None:
        """Hand over a tree; returns once it is stored.

        Raises:
            RefusedError: the tree is too large, invalid or too old; replay will give the prompt out again.
        """
        frames = encode_tree(tree)
        size = sum(map(len, frames))
        if self._max_tree_bytes is not None and size > self._max_tree_bytes:
            raise RefusedError(
                Refusal.OVERSIZE,
                f"the tree of {lease.prompt_id} has {size} bytes, more than replay.max_tree_bytes="
                f"{self._max_tree_bytes}",
                retry=False,
            )
        digest = digest_of(frames)
        message = PutTree(lease_id=lease.lease_id, attempt=lease.attempt, digest=digest)
        await self._ask(message, frames)

    async def give_up(self, lease: Leased, reason: str) -> None:
        """Let another actor try."""
        await self._ask(GiveUp(lease_id=lease.lease_id, attempt=lease.attempt, reason=reason[:200]))

    async def leave(self, *, timeout_s: float) -> bool:
        """Give back all that this actor holds or is about to get. Whether replay heard it in time; else leases expire."""
        goodbye = GiveUp(lease_id="", attempt=0, reason=LEFT)
        try:
            await self._replay.ask(goodbye, timeout_s=timeout_s, wait="an answer to GiveUp")
        except (DeadlineError, WireError):
            return False
        return True

    async def beat(self, lease_ids: Iterable[str]) -> list[str]:
        """Say that work on these leases goes on. Gives those that are not this actor's any more.

        Raises:
            DeadlineError: no answer within `SILENT_S`.
            RefusedError: a later process has this actor's place.
        """
        beat = Beat(leases=sorted(lease_ids))
        answer, _ = await self._replay.ask(beat, timeout_s=SILENT_S, wait="an answer to Beat")
        if not isinstance(answer, Beating):
            raise WireError(f"Beat was answered by {type(answer).__name__}")
        self._heard_at = _now()
        return answer.lost

    async def _ask(
        self, message: Message, attachment: Sequence[bytes] = ()
    ) -> tuple[Message, list[bytes]]:
        wait = f"an answer to {type(message).__name__}"
        while True:
            try:
                return await self._replay.ask(
                    message, attachment, timeout_s=self._reply_timeout_s, wait=wait
                )
            except DeadlineError:
                if _now() - self._heard_at > 2 * SILENT_S:
                    raise


def prompt_of(lease: Leased) -> Prompt:
    """The prompt of a lease."""
    ids = np.array(lease.token_ids, dtype=np.int32)
    return Prompt(id=lease.prompt_id, token_ids=ids, text=lease.text, answer=lease.answer)


def _old_tree(frames: Sequence[bytes]) -> Tree | None:
    try:
        return decode_tree(frames) if frames else None
    except WireError as error:
        # the tree is grown from its root then
        log.warning("the old tree of a lease cannot be read: %s", error)
        return None


def _now() -> float:
    return asyncio.get_running_loop().time()
