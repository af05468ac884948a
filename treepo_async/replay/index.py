"""The index of the replay log: an SQLite file that says where the queue stands without reading the log.

    leases   one row for each prompt ever leased: the run's account; rows of ended ones stay
    trees    where the trees lie that are kept
    steps    what came out of each step of the learner, by lineage
    meta     format, run_id, counts, rebuilt_from (counts as they were where the account begins), and the position of the log up to which the index speaks for it

The log decides: the index can be made of it again, except for rows of ended leases older than the log. Every row has a
digest, so that no damage is taken for a fact. Errors of the disk are raised as OSError, with nothing changed; what cannot
be an index, as DataError. WAL and synchronous=FULL: a commit that has returned is on disk.
"""

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

from treepo_async.errors import ConfigError, DataError
from treepo_async.replay.entry import LIVE, Row, State
from treepo_async.replay.notes import Note, TreeRow
from treepo_async.replay.state import Counts, QueueState, StepRow, row_of

FORMAT = "2"
"""Of index and log together."""
_KEPT = ", ".join(f"'{state}'" for state in (*LIVE, State.CONSUMED))
_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
}
_TABLES = {
    "leases": "prompt_index integer primary key, state, attempt, owner, failed, step, oldest_step, reason, "
    "uncounted",
    "trees": "prompt_index integer primary key, attempt, digest, bytes, segment, offset, length",
    "steps": "lineage, step, digest",
    "meta": "key primary key, value",
}


class Position(NamedTuple):
    """Up to where the index speaks for the log."""

    segment: int
    offset: int
    sequence: int
    """Of the last note before it."""


class Index:
    """See the module."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @classmethod
    def open(cls, file: Path) -> Self:
        """Open an index, and make it where there is none.

        Raises:
            DataError: the file is no index, or damaged.
            ConfigError: it is of another version of this program.
        """
        with _as_our_errors():
            database = sqlite3.connect(file, isolation_level=None)
            index = cls(database)
            try:
                index._prepare()
            except BaseException:
                database.close()
                raise
            return index

    def close(self) -> None:
        """Let the file go."""
        self._database.close()

    # ---------------------------------------------------------------- reading

    def leases(self) -> list[Row]:
        """Every prompt ever leased, by prompt index."""
        return self._leases("order by prompt_index")

    def given_up(self) -> list[Row]:
        """Every prompt that was quarantined, by prompt index."""
        return self._leases(f"where state = '{State.QUARANTINED}' order by prompt_index")

    def trees(self) -> list[TreeRow]:
        """The trees that are kept, by prompt index."""
        rows = self._rows("trees", "order by prompt_index")
        return [TreeRow(*row)._replace(digest=row[2] & (2**64 - 1)) for row in rows]

    def steps(self) -> list[StepRow]:
        """The steps of the learner, by step and lineage."""
        return [StepRow(*row) for row in self._rows("steps", "order by step, lineage")]

    def meta(self) -> dict[str, str]:
        """What is said of the whole; empty for an index that was just made."""
        return dict(self._rows("meta", ""))

    def position(self) -> Position | None:
        """Up to where it speaks for the log; None for an index that was just made."""
        meta = self.meta()
        return Position(*json.loads(meta["log"])) if "log" in meta else None

    def state(self) -> QueueState:
        """Where the queue stands.

        Raises:
            DataError: it contradicts itself.
        """
        meta = self.meta()
        counts = Counts.parse(meta["counts"]) if "counts" in meta else Counts()
        where = f"where state in ({_KEPT}) or step >= ? order by prompt_index"
        rows = self._leases(where, counts.num_retired)
        steps = self._rows("steps", "where step >= ? order by step, lineage", counts.num_retired)
        state = QueueState(
            counts,
            tuple(rows),
            tuple(StepRow(*row) for row in steps),
        )
        state.check()
        return state

    # ---------------------------------------------------------------- writing

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within is there together, on disk, or not at all."""
        with _as_our_errors():
            self._database.execute("begin immediate")
            try:
                yield
                self._database.execute("commit")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("rollback")
                raise

    def apply(self, note: Note, segment: int, offset: int, *, lost: Iterable[int] = ()) -> None:
        """Take over what a note says, within a transaction.

        Args:
            note: the one after the last.
            segment: in which it ends,
            offset: and where.
            lost: prompt indexes whose trees are not kept any more.
        """
        self._delete_trees(lost)
        if note.changes is not None:
            self._put_leases(note.changes.rows)
            self._database.executemany(
                "delete from leases where prompt_index = ?",
                [(index,) for index in note.changes.gone],
            )
            self._put("steps", note.changes.steps)
            self._put("meta", [("counts", note.changes.counts.to_json())])
        self._put("trees", [_signed(tree) for tree in note.trees])
        self._point_at(note, segment, offset)

    def restore(self, snapshot: Note, segment: int, offset: int) -> None:
        """Take over a whole state; of the account only what has ended stays. Within a transaction."""
        self._database.execute(f"delete from leases where state in ({_KEPT})")
        self._database.execute("delete from trees")
        self.apply(snapshot, segment, offset)

    def begin_account(self, counts: Counts) -> None:
        """Note that rows of what had ended before may be missing. Within a transaction."""
        self._put("meta", [("rebuilt_from", counts.to_json())])

    def _prepare(self) -> None:
        run = self._database.execute
        run("pragma journal_mode=wal")
        run("pragma synchronous=full")
        found = run("pragma quick_check").fetchall()
        if found != [("ok",)]:
            raise DataError(f"the index is damaged: {found[0][0]}")
        for table, columns in _TABLES.items():
            extra = ", primary key (lineage, step)" if table == "steps" else ""
            run(f"create table if not exists {table} ({columns}, row_digest{extra})")
        # as text: a row digest of another format may be made otherwise
        formats = run("select value from meta where key = 'format'").fetchall()
        if formats not in ([], [(FORMAT,)]):
            raise ConfigError(
                f"the index is of format {formats[0][0]}, this program reads {FORMAT}: go on with the version "
                "that wrote it, or begin in another run_dir"
            )

    def _rows(self, table: str, where: str, *values: int) -> list[Any]:
        with _as_our_errors():
            rows = self._database.execute(f"select * from {table} {where}", values).fetchall()
        for row in rows:
            if _digest(row[:-1]) != row[-1]:
                raise DataError(f"the index is damaged: a row of {table} begins with {row[0]}")
        return [row[:-1] for row in rows]

    def _leases(self, where: str, *values: int) -> list[Row]:
        rows = self._rows("leases", where, *values)
        return [row_of((*row[:4], json.loads(row[4]), *row[5:])) for row in rows]

    def _put(self, table: str, rows: Iterable[Sequence[Any]]) -> None:
        marks = ", ".join("?" * (2 + _TABLES[table].count(",")))
        self._database.executemany(
            f"insert or replace into {table} values ({marks})",
            [(*row, _digest(row)) for row in rows],
        )

    def _put_leases(self, rows: Iterable[Row]) -> None:
        self._put("leases", [(*row[:4], json.dumps(row.failed), *row[5:]) for row in rows])

    def _delete_trees(self, indexes: Iterable[int]) -> None:
        self._database.executemany(
            "delete from trees where prompt_index = ?", [(index,) for index in indexes]
        )

    def _point_at(self, note: Note, segment: int, offset: int) -> None:
        position = Position(segment, offset, note.sequence)
        self._put(
            "meta",
            [("format", FORMAT), ("run_id", note.run_id), ("log", json.dumps(position))],
        )


def _digest(row: Sequence[Any]) -> int:
    """63 bits: SQLite has no unsigned numbers."""
    return xxhash.xxh3_64_intdigest(json.dumps(row).encode()) >> 1


def _signed(tree: TreeRow) -> tuple[int, ...]:
    digest = tree.digest - 2**64 if tree.digest >= 2**63 else tree.digest
    return (*tree[:2], digest, *tree[3:])


@contextlib.contextmanager
def _as_our_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code not in _ERRORS:
            raise DataError(f"the index is damaged: {error}") from error
        raise OSError(_ERRORS[code], os.strerror(_ERRORS[code]), f"index: {error}") from error
