"""What one turn of the server brings about, all of it or none: changes and trees go to disk together, then answers go out.

An answer is a promise, so none is sent before what it promises is on disk. A disk that is full or fails leaves everything
pending: it is tried again with every turn, nothing else happens to the queue meanwhile, and no promise is broken. Waits
for the disk alone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from treepo_async.metrics.events import emit
from treepo_async.replay.dead_letters import Letter
from treepo_async.replay.entry import Entry, State
from treepo_async.replay.queue import Queue
from treepo_async.replay.state import Changes
from treepo_async.replay.store import NewTree
from treepo_async.wire.messages import Message

_WITHOUT_TREE = (State.DROPPED, State.QUARANTINED)


class Sender(Protocol):
    """What answers go out by; see `wire.sockets.Router`."""

    def send_now(self, peer: bytes, message: Message, attachment: Sequence[bytes] = ()) -> bool:
        """Send, unless the peer is gone or does not read."""


class Keeper(Protocol):
    """Where things are kept; see `replay.store.Store`."""

    @property
    def num_bytes(self) -> int:
        """Of all trees."""

    @property
    def largest(self) -> int:
        """Bytes of the largest tree."""

    def commit(self, changes: Changes | None, trees: Sequence[NewTree] = ()) -> None:
        """Return once all is on disk; raises OSError where nothing of it is."""

    def forget(self, lease_ids: Iterable[str]) -> None:
        """These trees are not needed any more."""


class Letters(Protocol):
    """Where it is written who was given up; see `replay.dead_letters.DeadLetters`."""

    def add(self, letter: Letter) -> None:
        """Return once it is on disk; raises OSError."""


class Answer(NamedTuple):
    """A message that waits for the commit."""

    peer: bytes
    message: Message
    frames: Sequence[bytes]
    unsent: Callable[[], None] | None
    """Called where it cannot be delivered."""


@dataclass
class Group:
    """See the module."""

    router: Sender
    queue: Queue
    store: Keeper
    letters: Letters
    trees: dict[str, NewTree] = field(default_factory=dict)
    """Accepted and not on disk, by lease id."""
    is_stuck: bool = False
    """Whether the disk took the last commit not."""
    _answers: list[Answer] = field(default_factory=list)
    _forgotten: list[str] = field(default_factory=list)
    _letters: list[Letter] = field(default_factory=list)
    _is_mute: bool = False
    """Whether the last letter could not be written."""
    _changes: Changes | None = None
    """Those of a commit that failed."""

    def __post_init__(self) -> None:
        self.largest = self.store.largest
        """Bytes of the largest tree so far."""

    @property
    def num_bytes(self) -> int:
        """Of all trees, on disk or on their way."""
        return self.store.num_bytes + sum(tree.length for tree in self.trees.values())

    def add(self, tree: NewTree) -> None:
        """An accepted tree goes to disk with everything else."""
        self.trees[tree.lease_id] = tree
        self.largest = max(self.largest, tree.length)

    def bury(self, letter: Letter) -> None:
        """A prompt is given up, which is written down once that is on disk."""
        self._letters.append(letter)

    def answer(
        self,
        peer: bytes,
        message: Message,
        frames: Sequence[bytes] = (),
        *,
        unsent: Callable[[], None] | None = None,
    ) -> None:
        """Send it once everything up to here is on disk."""
        self._answers.append(Answer(peer, message, frames, unsent))

    def forget(self, lease_ids: Iterable[str]) -> None:
        """These trees are not needed any more, once that is on disk."""
        self._forgotten.extend(lease_ids)

    def settle(self) -> bool:
        """Write what there is, then send what waits for it. False where the disk did not take it."""
        changes = self._changes if self.is_stuck else self.queue.take_changes()
        try:
            if changes is not None or self.trees:
                self.store.commit(changes, list(self.trees.values()))
        except OSError as error:
            self._changes = changes
            if not self.is_stuck:
                self.is_stuck = True
                emit(
                    "alarm", alarm="replay cannot write, nothing is acknowledged", detail=str(error)
                )
            return False
        if self.is_stuck:
            self.is_stuck = False
            emit("alarm", alarm="replay can write again", detail="nothing was lost")
        self.trees.clear()
        self._forget(changes)
        self._write_letters()
        self._send()
        return True

    def _forget(self, changes: Changes | None) -> None:
        """Let go of what was retired, and of trees that were too old whose prompts ended since."""
        rows = () if changes is None else changes.rows
        ended = [Entry.of(row).lease_id for row in rows if row.state in _WITHOUT_TREE]
        if ended or self._forgotten:
            self.store.forget([*self._forgotten, *ended])
            self._forgotten = []

    def _write_letters(self) -> None:
        """One that cannot be written waits for the next turn; nothing else waits for it."""
        try:
            while self._letters:
                self.letters.add(self._letters[0])
                del self._letters[0]
        except OSError as error:
            if not self._is_mute:
                emit("alarm", alarm="a dead letter cannot be written", detail=str(error))
            self._is_mute = True
        else:
            self._is_mute = False

    def _send(self) -> None:
        answers, self._answers = self._answers, []
        for answer in answers:
            is_sent = self.router.send_now(answer.peer, answer.message, answer.frames)
            if not is_sent and answer.unsent is not None:
                answer.unsent()
