"""The learner's process of a node that is not the first: it starts and ends its ranks as the leader says.

Waits: for the leader to listen and to let it in (`join_timeout_s`, from the loss of the last connection on; the driver starts a leader
that died again), for the leader's word and for the end of its own ranks (the kernel ends both). A connection that is lost ends
the ranks. Neighbours: `lead` is the other end, `node` has the ranks, `group_line` the words.
"""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from treepo_async.errors import TreepoError
from treepo_async.learner.group_line import (
    GREETING,
    Line,
    LineError,
    Message,
    is_proof,
    nonce,
    proof,
)
from treepo_async.learner.node import Failure, Ranks, Work, spare_garbage

RETRY_S = 0.2
ANSWER_S = 10.0


@dataclass
class Follower:
    """See the module."""

    address: str
    """`host:port` of the leader."""
    secret: bytes
    role: str
    own_ranks: range
    make_work: Callable[[Message], Work]
    """What the ranks do, by what the leader says of a start."""
    join_timeout_s: float
    on_join: Callable[[], None]
    on_over: Callable[[], None]
    """Called when the leader has said that all is over: an exit code of 0 is that of a process that was asked to end, too."""
    _ranks: Ranks = field(default_factory=lambda: Ranks([], []))
    _generation: int = 0
    _failure: Failure | None = None
    """Of the newest start, on this node."""

    def run(self) -> None:
        """Follow until the leader says that all is over.

        Raises:
            TreepoError: the leader was not there in time.
        """
        spare_garbage()
        while True:
            line = self._join()
            self.on_join()
            try:
                if self._follow(line):
                    self.on_over()
                    return
            except LineError:
                # the leader is gone, and joins a generation anew
                continue
            finally:
                self._ranks.kill()
                line.close()

    def _follow(self, line: Line) -> bool:
        """Do as the leader says. True when all is over."""
        # what came right behind the handshake was read with it
        messages = line.whole()
        while True:
            for message in messages:
                if message.get("say") == "over":
                    return True
                self._do(line, message)
            sources: list[Any] = [line, *self._ranks.sentinels()]
            ready: list[Any] = wait(sources)
            self._look_at_ranks(line, ready)
            messages = line.receive() if line in ready else []

    def _do(self, line: Line, message: Message) -> None:
        match message.get("say"):
            case "begin":
                self._generation, self._failure = int(message["generation"]), None
                self._ranks = Ranks.start(self.make_work(message), self.own_ranks)
            case "end":
                # one that was killed a moment ago is the cause of what others saw
                self._failure = self._failure or self._ranks.reap(
                    wait(self._ranks.sentinels(), timeout=0) if self._ranks.running else []
                )
                self._ranks.kill()
                line.send(say="ended", generation=self._generation, **_told(self._failure))

    def _look_at_ranks(self, line: Line, ready: list[Any]) -> None:
        before = len(self._ranks.running)
        failure = self._ranks.reap(ready)
        if failure is not None:
            self._failure = failure
            self._ranks.kill()
            line.send(say="failed", generation=self._generation, **_told(failure))
        elif before and not self._ranks.running:
            line.send(say="done", generation=self._generation)

    # ---------------------------------------------------------------- joining

    def _join(self) -> Line:
        """A connection to the leader, both ends proven.

        Raises:
            TreepoError: there was none in time.
        """
        host, _, port = self.address.rpartition(":")
        deadline = time.monotonic() + self.join_timeout_s
        while True:
            try:
                line = Line(socket.create_connection((host, int(port)), timeout=ANSWER_S))
            except OSError as error:
                reason = str(error)
            else:
                try:
                    self._greet(line)
                except LineError as error:
                    line.close()
                    reason = str(error)
                else:
                    return line
            if time.monotonic() > deadline:
                raise TreepoError(
                    f"{self.role} did not reach the learner's first node at {self.address} within "
                    f"{self.join_timeout_s:g} s: {reason}; see logs/learner-0.log, and whether the port is open"
                )
            time.sleep(RETRY_S)

    def _greet(self, line: Line) -> None:
        """Both ends show that they know the secret.

        Raises:
            LineError: the other one does not, or is silent.
        """
        challenge, own = line.receive_one(ANSWER_S).get("nonce"), nonce()
        if not isinstance(challenge, str):
            raise LineError("it does not lead")
        words = [own, self.role, self.own_ranks.start, len(self.own_ranks)]
        line.send(
            **dict(zip(GREETING, words, strict=True)),
            proof=proof(self.secret, "follow", challenge, *words),
        )
        if not is_proof(
            line.receive_one(ANSWER_S).get("proof"), self.secret, "lead", own, challenge
        ):
            raise LineError("it does not know the secret of this run")


def _told(failure: Failure | None) -> Mapping[str, Any]:
    if failure is None:
        return {}
    return {
        "cause": failure.cause,
        "is_final": failure.is_final,
        "was_killed": failure.was_killed,
    }
