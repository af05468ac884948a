"""The learner's process of the first node: it leads those of the other nodes from one start of all ranks to the next.

    all nodes joined -> begin (checkpoint, rendezvous) -> ranks everywhere -> one fails anywhere -> end everywhere -> begin ...
                                                                          -> all done -> over

Waits: for the other nodes to join (`join_timeout_s`; the driver starts a process that died again), for the end of any rank or word
of any node (the kernel ends the wait), for all nodes to have ended a start (`END_S`), and for the last ranks once rank 0 is done
(`END_S`). A node whose process or connection is gone is a failure of the start. Neighbours: `node` has the ranks of this
node, `follow` is the other end, `group_line` the words.
"""

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
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
from treepo_async.learner.node import (
    END_S,
    Failure,
    Ranks,
    Work,
    check_restart,
    spare_garbage,
)

BIND_S = 10.0
"""For an earlier process of this role to let go of the port."""
MAX_STRANGERS = 16
"""Connections that have not shown that they know the secret; beyond it the oldest is closed."""
ACCEPT_S = 1.0

Start = tuple[Work, Mapping[str, Any]]
"""What the ranks of this node do, and what the other nodes must know to do the same."""


@dataclass
class _Node:
    """Another node that has joined."""

    role: str
    ranks: range
    line: Line
    has_ended: bool = True
    """Whether nothing of the newest start runs there any more."""
    is_done: bool = False
    """Whether all ranks of the newest start ended well there."""


@dataclass
class Leader:
    """See the module."""

    listener: socket.socket
    secret: bytes
    world_size: int
    own_ranks: range
    make_start: Callable[[], Start]
    """Called before each start of all ranks."""
    max_restarts: int
    join_timeout_s: float
    end_s: float = END_S
    _nodes: dict[str, _Node] = field(default_factory=dict)
    _strangers: dict[Line, str] = field(default_factory=dict)
    """Connections before their proof, with the nonce that they were sent."""
    _generation: int = 0

    def run(self) -> None:
        """Run all ranks to their end.

        Raises:
            TreepoError: a rank failed for a reason of the run, the ranks failed too often, or a node did not join.
        """
        spare_garbage()
        num_restarts = 0
        while (failure := self._run_once()) is not None:
            check_restart(failure, num_restarts, self.max_restarts)
            num_restarts += 1
        for node in self._nodes.values():
            self._tell(node, say="over")

    # ---------------------------------------------------------------- one start

    def _run_once(self) -> Failure | None:
        self._gather()
        work, order = self.make_start()
        self._generation += 1
        for node in list(self._nodes.values()):
            node.has_ended, node.is_done = False, False
            self._tell(node, say="begin", generation=self._generation, **order)
        ranks = Ranks.start(work, self.own_ranks)
        try:
            failure = self._watch(ranks)
        finally:
            ranks.kill()
        return None if failure is None else self._end(failure)

    def _watch(self, ranks: Ranks) -> Failure | None:
        """Until all ranks of all nodes are done, or the first failure."""
        deadline = None
        while ranks.running or not all(node.is_done for node in self._nodes.values()):
            if self._missing():
                return Failure("a node of the learner is gone", is_final=False, was_killed=True)
            ready = self._wait(ranks.sentinels(), deadline)
            if ready is None:
                late = [node.role for node in self._nodes.values() if not node.is_done]
                names = ", ".join([*([str(ranks)] if ranks.running else []), *late])
                return Failure(f"{names} did not end {self.end_s:g} s after rank 0", is_final=False)
            failures = [*self._hear(ready), *filter(None, [ranks.reap(ready)])]
            if failures:
                return max(failures, key=lambda failure: failure.weight)
            if len(ranks.running) < len(ranks.all):
                deadline = deadline or time.monotonic() + self.end_s
        return None

    def _end(self, failure: Failure) -> Failure:
        """Have every node end the start. Gives the failure that was the cause, which another node may have seen."""
        for node in list(self._nodes.values()):
            self._tell(node, say="end", generation=self._generation)
        found, deadline = [failure], time.monotonic() + self.end_s
        while not all(node.has_ended for node in self._nodes.values()):
            ready = self._wait([], deadline)
            if ready is None:
                for node in [node for node in self._nodes.values() if not node.has_ended]:
                    # its process sees that, ends its ranks and joins again
                    self._lose(node)
                break
            found += self._hear(ready)
        return max(found, key=lambda failure: failure.weight)

    def _gather(self) -> None:
        """Until every rank has a node.

        Raises:
            TreepoError: one did not join in time.
        """
        deadline = time.monotonic() + self.join_timeout_s
        while self._missing():
            ready = self._wait([], deadline)
            if ready is None:
                raise TreepoError(
                    f"ranks {', '.join(map(str, self._missing()))} have no node: no learner process joined "
                    f"{self.listener.getsockname()} within {self.join_timeout_s:g} s; see logs/learner-*.log"
                )
            # what they say is of an earlier start
            self._hear(ready)

    def _missing(self) -> list[int]:
        there = {rank for node in self._nodes.values() for rank in node.ranks} | {*self.own_ranks}
        return [rank for rank in range(self.world_size) if rank not in there]

    # ---------------------------------------------------------------- connections

    def _wait(self, sentinels: Sequence[int], deadline: float | None) -> list[Any] | None:
        """What has something to tell; None at the deadline."""
        lines = [node.line for node in self._nodes.values()]
        sources: list[Any] = [*sentinels, self.listener, *lines, *self._strangers]
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        return list(wait(sources, timeout=timeout)) or None

    def _hear(self, ready: Sequence[Any]) -> list[Failure]:
        """Take what connections tell. Gives failures of the newest start."""
        # before a stranger becomes one of them: what made it ready is read then
        nodes = [node for node in self._nodes.values() if node.line in ready]
        if self.listener in ready:
            self._accept()
        failures: list[Failure] = []
        for line in [line for line in self._strangers if line in ready]:
            failures += self._admit(line)
        for node in [node for node in nodes if self._nodes.get(node.role) is node]:
            try:
                for message in node.line.receive():
                    failures += self._take(node, message)
            except LineError as error:
                self._lose(node)
                cause = f"{node.role} is gone: {error}"
                failures.append(Failure(cause, is_final=False, was_killed=True))
        return failures

    def _take(self, node: _Node, message: Message) -> list[Failure]:
        if message.get("generation") != self._generation:
            return []
        match message.get("say"):
            case "done":
                node.is_done = True
            case "ended":
                node.has_ended = True
        if message.get("cause"):
            known = (bool(message.get("is_final")), bool(message.get("was_killed")))
            return [Failure(f"{node.role}: {message['cause']}", *known)]
        return []

    def _accept(self) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:
            # it hung up before it was accepted
            return
        line, challenge = Line(connection), nonce()
        with contextlib.suppress(LineError):
            line.send(nonce=challenge)
            self._strangers[line] = challenge
        if len(self._strangers) > MAX_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.close()

    def _admit(self, line: Line) -> list[Failure]:
        """Let a connection in that shows that it knows the secret; another one is closed. Gives the failure that it shows."""
        try:
            messages = line.receive()
            if not messages:
                return []
            node = self._proven(line, messages[0])
        except LineError:
            self._strangers.pop(line, None)
            line.close()
            return []
        earlier = self._nodes.get(node.role)
        self._nodes[node.role] = node
        if earlier is None:
            return []
        earlier.line.close()
        # its first connection is lost, which was not seen yet
        cause = f"{node.role} has joined again"
        return [Failure(cause, is_final=False, was_killed=True)]

    def _proven(self, line: Line, said: Message) -> _Node:
        """The node at the other end.

        Raises:
            LineError: it does not know the secret, or is gone.
        """
        challenge = self._strangers.pop(line)
        words: list[Any] = [said.get(name) for name in GREETING]
        # before anything is made of them: whoever it is may have sent anything
        if [type(word) for word in words] != [str, str, int, int]:
            raise LineError("it says what no node says")
        if not is_proof(said.get("proof"), self.secret, "follow", challenge, *words):
            raise LineError("it does not know the secret")
        own, role, first, number = words
        line.send(proof=proof(self.secret, "lead", own, challenge))
        return _Node(role, range(first, first + number), line)

    def _tell(self, node: _Node, **message: Any) -> None:
        try:
            node.line.send(**message)
        except LineError:
            self._lose(node)

    def _lose(self, node: _Node) -> None:
        node.line.close()
        if self._nodes.get(node.role) is node:
            del self._nodes[node.role]


def listen(address: str) -> socket.socket:
    """A listener at `host:port`.

    Raises:
        OSError: the port is taken, also after a while.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + BIND_S
    while True:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, int(port)))
            listener.listen()
        except OSError:
            listener.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            listener.settimeout(ACCEPT_S)
            return listener
