"""What an actor asks of replay: a lease, and to take its tree."""

from collections.abc import Iterable

import numpy as np

from treepo_async.errors import RefusedError, WireError
from treepo_async.types import Prompt, Tree
from treepo_async.wire.codec import encode_tree
from treepo_async.wire.messages import (
    AskLease,
    Beat,
    GiveUp,
    Hello,
    Leased,
    NoLease,
    PutTree,
)
from treepo_async.wire.sockets import Requester

LEASE_WAIT_S = 5.0
"""Replay answers within this time, if only to say why there is no lease."""


class ReplayClient:
    """Requests of one actor."""

    def __init__(self, requester: Requester, *, reply_timeout_s: float = 60.0) -> None:
        """Prepare.

        Args:
            requester: connected to replay.
            reply_timeout_s: longest wait for an answer; a replay that was killed must be able to start within it.
        """
        self._replay, self._reply_timeout_s = requester, reply_timeout_s

    async def hello(self, *, name: str, run_id: str, timeout_s: float) -> None:
        """Introduce this actor; waits until replay is up.

        Raises:
            RefusedError: replay belongs to another run.
            DeadlineError: replay did not come up.
        """
        await self._replay.ask(
            Hello(name=name, run_id=run_id), timeout_s=timeout_s, wait="replay to come up"
        )

    async def lease(self) -> Leased | None:
        """A prompt, waited for as long as it takes; None when there will be none any more."""
        while True:
            answer, _ = await self._replay.ask(
                AskLease(wait_s=LEASE_WAIT_S),
                timeout_s=self._reply_timeout_s,
                wait="an answer to AskLease",
            )
            if isinstance(answer, Leased):
                return answer
            if not isinstance(answer, NoLease):
                raise WireError(f"AskLease was answered by {type(answer).__name__}")
            if answer.final:
                return None

    async def put(self, lease: Leased, tree: Tree) -> None:
        """Hand over a tree; returns once it is stored.

        Raises:
            RefusedError: the tree is invalid or too old; replay will give the prompt out again.
        """
        message = PutTree(lease_id=lease.lease_id, attempt=lease.attempt)
        await self._replay.ask(
            message, encode_tree(tree), timeout_s=self._reply_timeout_s, wait="the ack of a tree"
        )

    async def give_up(self, lease: Leased, reason: str) -> None:
        """Let another actor try."""
        message = GiveUp(lease_id=lease.lease_id, attempt=lease.attempt, reason=reason)
        await self._replay.ask(message, timeout_s=self._reply_timeout_s, wait="an answer to GiveUp")

    async def beat(self, lease_ids: Iterable[str]) -> None:
        """Say that work on these leases goes on."""
        await self._replay.tell(Beat(leases=sorted(lease_ids)))


def prompt_of(lease: Leased) -> Prompt:
    """The prompt of a lease."""
    ids = np.array(lease.token_ids, dtype=np.int32)
    return Prompt(id=lease.prompt_id, token_ids=ids, text=lease.text, answer=lease.answer)


def is_lost(error: RefusedError) -> bool:
    """Whether a refused tree is simply dropped: another attempt made it, or it came too late."""
    return error.reason in ("stale", "unknown_lease")
