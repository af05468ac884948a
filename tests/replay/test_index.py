import sqlite3

import pytest

from tests.replay.journal import comparable
from tests.replay.life import Life
from treepo_async.errors import ConfigError, DataError
from treepo_async.replay.index import Index, Position
from treepo_async.replay.notes import Note, TreeRow
from treepo_async.replay.state import Changes, Counts, QueueState, StepRow

TREE = TreeRow(3, 1, 2**64 - 1, 500, 1, 40, 600)


@pytest.fixture
def index(tmp_path):
    index = Index.open(tmp_path / "index.sqlite")
    yield index
    index.close()


def apply(index, note, *, offset=100, lost=()):
    with index.transaction():
        index.apply(note, 1, offset, lost=lost)


def test_an_index_begins_empty(index):
    assert (index.position(), index.meta(), index.state()) == (None, {}, QueueState())
    assert (index.leases(), index.trees(), index.steps()) == ([], [], [])


def test_what_notes_say_adds_up_to_the_queue(index):
    for number, commit in enumerate(Life().commits(60)):
        apply(index, Note(number, "run", (), commit.changes))
        assert comparable(index.state()) == comparable(commit.state)
    assert index.position() == Position(1, 100, 59)
    counts = commit.state.counts
    leases = index.leases()
    assert [row.prompt_index for row in leases] == list(range(counts.next_index)), "the account"
    assert sum(row.state == "trained" for row in leases) >= counts.ended["trained"]
    assert {(row.lineage, row.step) for row in index.steps()} == {
        (0, step) for step in range(counts.next_step)
    }


def test_prompts_that_count_as_never_leased_have_no_row(index):
    life = Life()
    life.queue.lease(0.0)
    apply(index, Note(0, "run", (), life.queue.take_changes()))
    life.queue.end_of_data("000000000")
    apply(index, Note(1, "run", (), life.queue.take_changes()))
    assert index.leases() == []
    assert index.state().counts.exhausted


def test_trees_are_kept_until_they_are_lost_and_the_later_one_counts(index):
    apply(index, Note(0, "run", (TREE, TREE._replace(prompt_index=4)), None))
    apply(index, Note(1, "run", (TREE._replace(attempt=2),), None), lost=[3, 4])
    assert index.trees() == [TREE._replace(attempt=2)]


def test_what_a_transaction_could_not_finish_is_not_there(index):
    apply(index, Note(0, "run", (TREE,), None))
    note = Note(1, "other", (), Changes(Counts(next_index=9), steps=(StepRow(0, 0, object()),)))
    with pytest.raises(TypeError):
        apply(index, note, offset=200, lost=[3])
    assert index.trees() == [TREE]
    assert index.meta()["run_id"] == "run"
    assert index.position() == Position(1, 100, 0)


def test_a_full_disk_is_an_error_of_the_disk_and_changes_nothing(index):
    (num_pages,) = index._database.execute("pragma page_count").fetchone()
    index._database.execute(f"pragma max_page_count = {num_pages}")
    many = tuple(TREE._replace(prompt_index=i) for i in range(5000))
    with pytest.raises(OSError, match="full"):
        apply(index, Note(0, "run", many, None))
    assert index.trees() == []
    index._database.execute(f"pragma max_page_count = {num_pages + 1000}")
    apply(index, Note(0, "run", many, None))
    assert len(index.trees()) == len(many)


def test_a_reader_sees_what_is_committed_while_another_process_writes(index, tmp_path):
    apply(index, Note(0, "run", (TREE,), None))
    reader = Index.open(tmp_path / "index.sqlite")
    assert reader.trees() == [TREE]
    with index.transaction():
        index.apply(Note(1, "run", (), None), 1, 100, lost=[3])
        assert reader.trees() == [TREE]
    assert reader.trees() == []
    reader.close()


def test_an_index_that_was_closed_can_be_read(tmp_path):
    index = Index.open(tmp_path / "index.sqlite")
    apply(index, Note(0, "run", (TREE,), None))
    index.close()
    reader = Index.open(tmp_path / "index.sqlite")
    assert reader.trees() == [TREE]
    reader.close()


@pytest.mark.parametrize("table", ["leases", "trees", "steps", "meta"])
def test_a_row_that_was_changed_otherwise_is_damage(index, table):
    life = Life()
    life.queue.lease(0.0)
    row = life.queue.take_changes().rows[0]
    changes = Changes(Counts(next_index=1), (row,), (), (StepRow(0, 0, "digest"),))
    apply(index, Note(0, "run", (TREE,), changes))
    column = {"leases": "owner", "trees": "offset", "steps": "digest", "meta": "value"}[table]
    index._database.execute(f"update {table} set {column} = '1'")
    with pytest.raises(DataError, match=f"damaged: a row of {table}"):
        getattr(index, table)()


def test_a_file_that_is_no_index_is_told(tmp_path):
    file = tmp_path / "index.sqlite"
    file.write_bytes(b"something else" * 100)
    with pytest.raises(DataError, match="damaged"):
        Index.open(file)
    assert file.read_bytes() == b"something else" * 100


def test_an_index_of_another_format_is_refused_and_left_as_it_is(tmp_path):
    file = tmp_path / "index.sqlite"
    Index.open(file).close()
    with sqlite3.connect(file) as database:
        database.execute("insert into meta values ('format', '1', 0)")
    database.close()
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="format 1, this program reads 2"):
        Index.open(file)
    assert file.read_bytes() == before


def test_every_commit_is_on_disk_before_the_next(index):
    assert index._database.execute("pragma synchronous").fetchone() == (2,)
    assert index._database.execute("pragma journal_mode").fetchone() == ("wal",)
