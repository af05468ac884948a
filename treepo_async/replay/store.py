"""Where accepted trees and the queue's state lie on disk.

    <folder>/log/00000001.seg ...   records appended: the trees of a commit, then a note of what it changed
    <folder>/index.sqlite           where the queue stands and where the trees lie, so that a start reads no log
    <folder>/quarantine/            bytes that were damaged
    <folder>/lock                   held by the process that writes here

A commit is one group: its records are appended and synced, then the index takes them over, then `commit` returns and peers
may be answered. Whatever a process was told by an answer is on disk, whenever it dies; a note without its index is applied
at the next start (`recovery`). A commit that fails leaves log and index as they were.

With `keeps_trees=False` trees are kept in memory and die with the process; the queue's state is on disk all the same.

A segment goes once none of its trees is needed, the newest two never. So the log can be larger than `num_bytes`, by two
segments and by what retired trees share with kept ones.
"""

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from treepo_async import chaos
from treepo_async.errors import ConfigError, DataError
from treepo_async.metrics.events import emit
from treepo_async.replay.entry import Row, State, prompt_index_of
from treepo_async.replay.index import Index
from treepo_async.replay.log import Log
from treepo_async.replay.notes import Note, TreeRow, tree_parts
from treepo_async.replay.record import Kind, length_of
from treepo_async.replay.recovery import (
    Paths,
    catch_up,
    open_index,
    quarantine,
    tree_at,
    whole_trees,
)
from treepo_async.replay.segments import file_of, segments_of
from treepo_async.replay.state import Changes, QueueState
from treepo_async.weights.durable import make_folder

KEPT_SEGMENTS = 2
"""Never deleted: should the snapshot of the newest be damaged, the one before it has one."""


class DamagedTreeError(DataError):
    """A stored tree cannot be read; its bytes are in quarantine, and the store has forgotten it."""


class NewTree(NamedTuple):
    """A tree to be stored."""

    lease_id: str
    attempt: int
    digest: int
    """Unsigned, 64 bits."""
    frames: Sequence[bytes]

    @property
    def length(self) -> int:
        """Bytes that it takes on disk."""
        return length_of(_parts_of(self))


@dataclass
class Store:
    """See the module; made by `open`."""

    paths: Paths
    run_id: str
    _keeps_trees: bool
    _index: Index
    _log: Log
    _lock: int
    _sequence: int = 0
    """Of the last commit."""
    _trees: dict[int, TreeRow] = field(default_factory=dict)
    """By prompt index; those in memory have no segment."""
    _frames: dict[int, list[bytes]] = field(default_factory=dict)
    """Of the trees in memory."""
    _lost: set[int] = field(default_factory=set)
    """Prompt indexes of trees that only the index still has."""

    @classmethod
    def open(
        cls,
        folder: Path,
        run_id: str,
        *,
        resume_step: int | None,
        segment_bytes: int,
        keeps_trees: bool = True,
    ) -> tuple["Store", QueueState]:
        """Go on where the last process stood; without one, begin.

        Args:
            folder: made if it is not there.
            run_id: of this run. What another run left goes on at a policy step, under this id.
            resume_step: that step; None for 0.
            segment_bytes: size at which a file of the log is followed by another.
            keeps_trees: whether trees are on disk.

        Raises:
            ConfigError: another process writes here.
            DataError: it cannot be told where the queue stands, or it cannot go on at `resume_step`.
            OSError: the disk does not let it.
        """
        paths = Paths(folder)
        make_folder(paths.log)
        lock = _lock(folder)
        try:
            index = open_index(paths)
            store = cls(paths, run_id, keeps_trees, index, Log(paths.log, segment_bytes), lock)
            return store, store._start(resume_step or 0)
        except BaseException:
            os.close(lock)
            raise

    @property
    def num_bytes(self) -> int:
        """Of the trees that are stored, on disk or in memory."""
        return sum(tree.length for tree in self._trees.values())

    @property
    def largest(self) -> int:
        """Bytes of the largest tree; 0 where there is none."""
        return max((tree.length for tree in self._trees.values()), default=0)

    def given_up(self) -> list[Row]:
        """Prompts that were quarantined, as far as the index knows."""
        return self._index.given_up()

    def commit(self, changes: Changes | None, trees: Sequence[NewTree] = ()) -> None:
        """Store trees and changes together; they are on disk when this returns.

        A tree takes the place of one that its lease has.

        Raises:
            OSError: nothing was stored; the same commit, or a larger one, may be tried again.
        """
        self._write(changes, trees if self._keeps_trees else ())
        if not self._keeps_trees:
            self._remember(trees)
        chaos.point("replay.after_index")

    def holds(self, lease_id: str) -> bool:
        """Whether the lease has a tree here."""
        return prompt_index_of(lease_id) in self._trees

    def digest_of(self, lease_id: str) -> tuple[int, int] | None:
        """Attempt and digest of a tree; None where there is none."""
        tree = self._trees.get(_index_of(lease_id))
        return None if tree is None else (tree.attempt, tree.digest)

    def read(self, lease_id: str) -> list[bytes]:
        """The frames of a tree that is held.

        Raises:
            DamagedTreeError: it is held no more; its prompt needs a tree again.
        """
        index = _index_of(lease_id)
        if index in self._frames:
            return self._frames[index]
        tree = self._trees[index]
        try:
            return tree_at(self.paths, tree)
        except DataError as error:
            quarantine(self.paths, [tree.place], "a stored tree is damaged")
            self._drop([index])
            raise DamagedTreeError(f"the tree of lease {lease_id} is lost: {error}") from error

    def forget(self, lease_ids: Iterable[str]) -> None:
        """Let go of trees whose leases a commit has ended; of others it does nothing."""
        self._drop(_index_of(lease_id) for lease_id in lease_ids)
        needed = {tree.segment for tree in self._trees.values()}
        for segment in segments_of(self.paths.log)[:-KEPT_SEGMENTS]:
            if segment not in needed:
                with contextlib.suppress(OSError):  # the next call tries again
                    file_of(self.paths.log, segment).unlink()

    def close(self) -> None:
        """Let the files go; nothing is left to be written."""
        self._log.close()
        self._index.close()
        os.close(self._lock)

    # ---------------------------------------------------------------- inside

    def _start(self, resume_step: int) -> QueueState:
        """Take over what the last process left."""
        suspects = catch_up(self._index, self.paths)
        position = self._index.position()
        self._sequence = position.sequence if position else 0
        found = self._index.state()
        self._find_trees(found, suspects)
        state = found
        if self._written_by not in ("", self.run_id):
            state = state.resumed_at(resume_step)
        state, lost = _without_trees(state, self._trees)
        if lost:
            emit("alarm", alarm="trees are lost, their prompts wait again", number=len(lost))
        if state != found or self._written_by != self.run_id:
            before = {row.prompt_index: row for row in found.rows}
            rows = tuple(row for row in state.rows if row != before[row.prompt_index])
            self._write(Changes(state.counts, rows), ())
        return state

    def _find_trees(self, state: QueueState, suspects: Iterable[TreeRow]) -> None:
        """Take those of the index that are needed, and there."""
        trees = {tree.prompt_index: tree for tree in self._index.trees()}
        bad = {tree.prompt_index for tree in suspects if not _is_whole(self.paths, tree)}
        good = {row.prompt_index for row in state.rows} - bad
        there = whole_trees(self.paths, trees.values())
        self._trees = {tree.prompt_index: tree for tree in there if tree.prompt_index in good}
        self._lost = trees.keys() - self._trees.keys()

    @property
    def _written_by(self) -> str:
        """Run of the last commit; empty before the first."""
        return self._index.meta().get("run_id", "")

    def _write(self, changes: Changes | None, trees: Sequence[NewTree]) -> None:
        if self._log.is_full:
            self._begin_segment()
        end = self._log.end
        try:
            places = self._log.append((Kind.TREE, _parts_of(tree)) for tree in trees)
            rows = tuple(
                TreeRow(*_key_of(tree), *place) for tree, place in zip(trees, places, strict=True)
            )
            note = Note(self._sequence + 1, self.run_id, rows, changes)
            (place,) = self._log.append([(Kind.NOTE, note.to_parts())])
            self._log.sync()
            chaos.point("replay.after_sync")
            with self._index.transaction():
                self._index.apply(note, place.segment, place.end, lost=self._lost)
        except BaseException:
            # whatever it was, a note that the index does not take must not be met by the next start
            self._log.cut(end)
            raise
        self._sequence = note.sequence
        self._lost.clear()
        self._trees.update({row.prompt_index: row for row in rows})

    def _begin_segment(self) -> None:
        """A further segment, with all that the index knows."""
        position = self._index.position()
        before = [0, *segments_of(self.paths.log), position.segment if position else 0]
        state = self._index.state()
        trees = tuple(tree for tree in self._trees.values() if tree.segment)
        whole = Changes(state.counts, state.rows, (), state.steps)
        snapshot = Note(self._sequence, self._written_by, trees, whole)
        self._log.begin(max(before) + 1, snapshot.to_parts())

    def _remember(self, trees: Iterable[NewTree]) -> None:
        for tree in trees:
            key = _key_of(tree)
            self._frames[key[0]] = [*tree.frames]
            self._trees[key[0]] = TreeRow(*key, 0, 0, key[-1])

    def _drop(self, indexes: Iterable[int]) -> None:
        for index in indexes:
            self._frames.pop(index, None)
            if self._trees.pop(index, None) is not None:
                self._lost.add(index)


def _without_trees(state: QueueState, trees: Container[int]) -> tuple[QueueState, tuple[Row, ...]]:
    """The state in which accepted entries without a tree wait again, and their rows."""
    waiting = {
        row.prompt_index: _waiting_again(row)
        for row in state.rows
        if row.state == State.ACCEPTED and row.prompt_index not in trees
    }
    if not waiting:
        return state, ()
    rows = tuple(waiting.get(row.prompt_index, row) for row in state.rows)
    reasons = Counter(state.counts.reasons) + Counter(tree_lost=len(waiting))
    counts = replace(state.counts, reasons=dict(reasons))
    return replace(state, counts=counts, rows=rows), tuple(waiting.values())


def _waiting_again(row: Row) -> Row:
    """As `LeaseOrder.reopen`."""
    return row._replace(
        state=str(State.WAITING), failed=(), oldest_step=None, uncounted=row.attempt
    )


def _index_of(lease_id: str) -> int:
    """The prompt index of a lease id; -1 for what is none."""
    index = prompt_index_of(lease_id)
    return -1 if index is None else index


def _key_of(tree: NewTree) -> tuple[int, int, int, int]:
    num_bytes = sum(memoryview(frame).nbytes for frame in tree.frames)
    return _index_of(tree.lease_id), tree.attempt, tree.digest, num_bytes


def _parts_of(tree: NewTree) -> list[bytes]:
    return tree_parts(_index_of(tree.lease_id), tree.attempt, tree.digest, tree.frames)


def _is_whole(paths: Paths, tree: TreeRow) -> bool:
    try:
        tree_at(paths, tree)
    except DataError:
        return False
    return True


def _lock(folder: Path) -> int:
    """Be the only process that writes to a folder, until the descriptor is closed or the process ends.

    Raises:
        ConfigError: another one is.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.pread(descriptor, 32, 0).decode()
        os.close(descriptor)
        raise ConfigError(f"{folder} is written to by process {owner}; end it first") from error
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
