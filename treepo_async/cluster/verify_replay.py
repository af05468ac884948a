"""Whether what replay has written down keeps its promises: see `invariants`. Nothing is written into its folder.

    index  -> a copy is opened, so that not even SQLite touches the folder
    log    -> every record is read; its notes are put together up to where the index speaks for them
    trees  -> each one that may still be trained is read back

A replay at work may change what is being read: then it is read again. Neighbours: `replay.store` and `replay.recovery` write and
repair what is only looked at here, `verify` looks at the rest of a run.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treepo_async.cluster import invariants
from treepo_async.cluster.invariants import Account, Delivery, Verdict
from treepo_async.errors import DataError, WireError
from treepo_async.replay.dead_letters import FILE as DEAD_LETTERS
from treepo_async.replay.entry import Row, State
from treepo_async.replay.index import Index, Position
from treepo_async.replay.notes import Note, TreeRow
from treepo_async.replay.record import Kind
from treepo_async.replay.recovery import Paths, tree_at
from treepo_async.replay.segments import scan, segments_of
from treepo_async.replay.state import Counts, StepRow
from treepo_async.types import NO_LINEAGE
from treepo_async.wire.codec import digest_of
from treepo_async.wire.facts import facts_of

MAX_LOOKS = 5
"""At a run whose processes change what is being read."""
MAX_COPIES = 50
WITH_TREE = (State.ACCEPTED, State.CONSUMED, State.TRAINED)
WITHOUT_TREE = (State.WAITING, State.LEASED)


def verify_replay(
    folder: Path,
    *,
    max_staleness: int,
    bounds: Mapping[int, int] | None = None,
    keeps_trees: bool = True,
    acks: Collection[Delivery] = (),
) -> list[Verdict]:
    """Check what replay has written down.

    Args:
        folder: `replay` of a run.
        max_staleness: that no batch may exceed.
        bounds: by step of the learner, where another one held.
        keeps_trees: whether trees are on disk.
        acks: see `verify_run`.
    """
    verdicts: list[Verdict] = []
    for _ in range(MAX_LOOKS):
        try:
            look = _Look.at(folder, reads_trees=keeps_trees)
        except (DataError, OSError) as error:
            verdicts = [Verdict("replay", holds=False, text=f"it cannot be read: {error}")]
        else:
            verdicts = look.verdicts(max_staleness, bounds or {}, acks)
            if all(verdict.holds for verdict in verdicts) or not look.is_old():
                return verdicts
    return verdicts


def stored_trees(folder: Path) -> dict[int, int]:
    """Digest of each tree that replay keeps, by prompt index, as read back from its log.

    Raises:
        DataError: the index cannot be read.
    """
    paths = Paths(folder)
    with _copied(paths.index) as index:
        rows = index.trees()
    found = ((row, _read_back(paths, row)[0]) for row in rows)
    return {row.prompt_index: row.digest for row, damage in found if not damage}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that are whole; none where there is no file.

    Raises:
        DataError: a line that is whole is no JSON object.
    """
    if not file.is_file():
        return []
    data = file.read_bytes()
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{file}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number} is no JSON object")
        rows.append(row)
    return rows


@dataclass
class _Look:
    """What was found in replay's folder at one moment."""

    paths: Paths
    position: Position | None
    account: Account
    log: Account
    num_records: int = 0
    num_bytes: int = 0
    damage: list[str] = field(default_factory=list)
    """Ranges of the log that are no records."""
    damaged: dict[int, str] = field(default_factory=dict)
    """What is wrong with stored trees, by prompt index."""
    ages: dict[int, int] = field(default_factory=dict)
    moves: list[tuple[int, int, int]] = field(default_factory=list)
    given_back: set[int] = field(default_factory=set)
    """Prompts whose accepted tree the log says was let go."""
    letters: list[dict[str, Any]] = field(default_factory=list)
    reads_trees: bool = True

    @classmethod
    def at(cls, folder: Path, *, reads_trees: bool) -> "_Look":
        """Look.

        Raises:
            DataError, OSError: there is no index, it is damaged, or files went away meanwhile.
        """
        paths = Paths(folder)
        with _copied(paths.index) as index:
            position, trees = index.position(), index.trees()
            account = _account_of(index)
        look = cls(paths, position, account, Account(Counts(), []), reads_trees=reads_trees)
        look._read_log()
        if reads_trees:
            look._read_trees(trees)
        look.letters = read_lines(folder / DEAD_LETTERS)
        return look

    def is_old(self) -> bool:
        """Whether replay has written since."""
        try:
            with _copied(self.paths.index) as index:
                return bool(index.position() != self.position)
        except (DataError, OSError):
            return False

    def verdicts(
        self, max_staleness: int, bounds: Mapping[int, int], acks: Collection[Delivery]
    ) -> list[Verdict]:
        """What holds."""
        account, reasons = self.account, self.account.counts.reasons
        found = [
            invariants.conserved(account),
            invariants.trained_once(account),
            invariants.moved_never(self.moves, reasons.get("batch_lost", 0)),
            invariants.results_repeat(account.steps),
            invariants.log_whole(self.num_records, self.num_bytes, self.damage),
            invariants.same_account(account, self.log),
            invariants.letters_kept(account, self.letters),
        ]
        if self.reads_trees:
            found += [
                invariants.trees_there(account, self.damaged),
                invariants.fresh_found(self.ages, max_staleness, self._by_prompt(bounds)),
            ]
        return found + ([invariants.acks_kept(account, acks, self.given_back)] if acks else [])

    def _by_prompt(self, bounds: Mapping[int, int]) -> dict[int, int]:
        return {
            row.prompt_index: bounds[row.step]
            for row in self.account.rows
            if row.step is not None and row.step in bounds
        }

    def _read_log(self) -> None:
        """Read every record, and put the notes together up to where the index stands."""
        with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
            log = closing(Index.open(Path(scratch) / "log.sqlite"))
            with log as rebuilt, rebuilt.transaction():
                steps: dict[int, int] = {}
                before: dict[int, Row] = {}
                for note, is_whole, place in self._records():
                    if self.position is None or (place[0], place[1]) > self.position[:2]:
                        continue
                    if is_whole:
                        rebuilt.restore(note, place[1], place[0])
                    else:
                        rebuilt.apply(note, *place)
                    self._follow(note, steps)
                    self._follow_back(note, before)
                self.log = _account_of(rebuilt)
        needed = {row.prompt_index for row in self.account.needed()}
        kept = {index: tree for index, tree in self.log.trees.items() if index in needed}
        self.log = Account(self.log.counts, self.log.rows, self.log.steps, kept)

    def _records(self) -> Iterable[tuple[Note, bool, tuple[int, int]]]:
        """Notes and snapshots in order, each with whether it is a snapshot and where it ends."""
        segments, last = segments_of(self.paths.log), -1
        for segment in segments:
            torn: str | None = None
            for found in scan(self.paths.log, segment, read=tuple(Kind)):
                if torn is not None:
                    self.damage.append(torn)
                torn = None
                self.num_bytes += found.place.length
                if found.kind is None:
                    torn = f"{found.place.length} bytes at {segment}:{found.place.offset}"
                    continue
                self.num_records += 1
                if found.kind is not Kind.TREE:
                    note = Note.parse(found.parts)
                    if found.kind is Kind.NOTE and note.sequence <= last:
                        continue
                    last = note.sequence
                    yield note, found.kind is Kind.SNAPSHOT, (segment, found.place.end)
            if torn is not None and segment != segments[-1]:
                self.damage.append(torn)

    def _follow(self, note: Note, steps: dict[int, int]) -> None:
        """Which prompts go from one batch to another."""
        for row in () if note.changes is None else note.changes.rows:
            if row.step is None:
                continue
            before = steps.setdefault(row.prompt_index, row.step)
            if before != row.step:
                self.moves.append((row.prompt_index, before, row.step))
                steps[row.prompt_index] = row.step

    def _follow_back(self, note: Note, before: dict[int, Row]) -> None:
        """Which prompts go from a tree back to none."""
        for row in () if note.changes is None else note.changes.rows:
            old = before.get(row.prompt_index)
            if old is not None and old.state in WITH_TREE and row.state in WITHOUT_TREE:
                self.given_back.add(row.prompt_index)
            before[row.prompt_index] = row

    def _read_trees(self, trees: Iterable[TreeRow]) -> None:
        rows = {row.prompt_index: row for row in self.account.needed()}
        for tree in trees:
            row = rows.get(tree.prompt_index)
            if row is None:
                continue
            damage, oldest_step = _read_back(self.paths, tree)
            if damage:
                self.damaged[tree.prompt_index] = damage
            elif row.step is not None and oldest_step is not None:
                self.ages[tree.prompt_index] = row.step - oldest_step


def _account_of(index: Index) -> Account:
    meta = index.meta()
    rebuilt_from = meta.get("rebuilt_from")
    return Account(
        Counts.parse(meta["counts"]) if "counts" in meta else Counts(),
        index.leases(),
        [StepRow(*row) for row in index.steps()],
        {row.prompt_index: (row.attempt, row.digest) for row in index.trees()},
        None if rebuilt_from is None else Counts.parse(rebuilt_from),
    )


def _read_back(paths: Paths, row: TreeRow) -> tuple[str, int | None]:
    """What is wrong with a stored tree, and the oldest step of its segments where it has one."""
    try:
        frames = tree_at(paths, row)
        facts = facts_of(frames)
    except (DataError, WireError) as error:
        return str(error), None
    if digest_of(frames) != row.digest:
        return "its digest is not that of the tree that was taken", None
    is_offline = all(version.lineage == NO_LINEAGE for version in facts.versions)
    return "", None if is_offline else facts.oldest.step


@contextmanager
def _copied(file: Path) -> Iterator[Index]:
    """A copy of an index, as it was at one moment.

    Raises:
        DataError: there is none, it is damaged, or it never stayed as it was while it was copied.
    """
    if not file.is_file():
        raise DataError(f"there is no index at {file}")
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        copy = Path(scratch) / file.name
        for _ in range(MAX_COPIES):
            before = _stamp(file)
            shutil.copyfile(file, copy)
            # frames of the write-ahead log have checksums, so that a torn end of it is none
            wal = file.with_name(f"{file.name}-wal")
            copy.with_name(f"{copy.name}-wal").write_bytes(
                wal.read_bytes() if wal.exists() else b""
            )
            if _stamp(file) == before:
                break
        else:
            raise DataError(f"{file} changes too fast to be read; try again")
        with closing(Index.open(copy)) as index:
            yield index


def _stamp(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size
