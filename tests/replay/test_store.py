import contextlib
import os
import random
import resource
import shutil
import tempfile
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.replay.journal import comparable
from tests.replay.life import SEGMENT_BYTES, Life, check_same, perform
from treepo_async import chaos
from treepo_async.errors import ConfigError, DataError
from treepo_async.replay.entry import Entry, State
from treepo_async.replay.index import Index
from treepo_async.replay.record import Kind
from treepo_async.replay.segments import file_of, scan, segments_of
from treepo_async.replay.state import QueueState
from treepo_async.replay.store import DamagedTreeError, NewTree, Store

SECTOR = 512
MEMORY = next((folder for folder in ("/dev/shm",) if Path(folder).is_dir()), None)
"""Syncs cost nothing there: what a crash leaves is said by images, not by the disk."""


@contextlib.contextmanager
def opened(folder, run_id="run", *, resume_step=None, segment_bytes=SEGMENT_BYTES, on_disk=True):
    store, state = Store.open(
        folder,
        run_id,
        resume_step=resume_step,
        segment_bytes=segment_bytes,
        keeps_trees=on_disk,
    )
    try:
        yield store, state
    finally:
        store.close()


def live(folder, number, *, seed=0):
    """A store with so many commits behind it. Gives them."""
    commits = Life(seed).commits(number)
    with opened(folder) as (store, _):
        for commit in commits:
            perform(store, commit)
    return commits


def newest(folder):
    return file_of(folder / "log", segments_of(folder / "log")[-1])


def lose_index(folder):
    for file in folder.glob("index.sqlite*"):
        file.unlink()


def flip(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x40
    file.write_bytes(data)


def image(folder):
    """A copy of the folder as a process killed now would leave it."""
    copy = Path(tempfile.mkdtemp(dir=folder.parent))
    shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*-shm"))
    return copy


# ------------------------------------------------------------------ one process


def test_a_run_begins_with_an_empty_queue(tmp_path):
    with opened(tmp_path / "deep" / "replay") as (store, state):
        assert (state, store.num_bytes) == (QueueState(), 0)


def test_a_tree_is_held_as_it_was_given_until_it_is_forgotten(tmp_path):
    tree = NewTree("000000003", 2, 2**64 - 1, [b"one", memoryview(b"two"), b""])
    with opened(tmp_path) as (store, _):
        store.commit(None, [tree])
        assert store.read("000000003") == [b"one", b"two", b""]
        assert store.digest_of("000000003") == (2, 2**64 - 1)
        assert store.num_bytes > 6
        for _ in range(2):
            store.forget(["000000003", "000000009", "no lease"])
        assert (store.holds("000000003"), store.digest_of("000000003")) == (False, None)
        assert store.num_bytes == 0


def test_what_was_never_stored_is_not_held(tmp_path):
    with opened(tmp_path) as (store, _):
        assert not store.holds("000000000")
        assert not store.holds("no lease")
        assert store.digest_of("no lease") is None
        with pytest.raises(KeyError):
            store.read("000000000")


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_tree_takes_the_place_of_the_one_before(tmp_path, on_disk):
    with opened(tmp_path, on_disk=on_disk) as (store, _):
        for attempt in (1, 2):
            store.commit(None, [NewTree("000000000", attempt, attempt, [b"x" * attempt])])
        assert store.read("000000000") == [b"xx"]
        assert store.digest_of("000000000") == (2, 2)


def test_a_process_that_starts_again_goes_on_where_the_last_one_stood(tmp_path):
    life = Life()
    for _ in range(5):
        commits = life.commits(8)
        with opened(tmp_path) as (store, _):
            for commit in commits:
                perform(store, commit)
        with opened(tmp_path) as (store, state):
            check_same(store, state, commits[-1])
            assert not (tmp_path / "quarantine").exists()


def test_segments_without_a_needed_tree_go_and_the_disk_is_bounded(tmp_path):
    life = Life(tree_bytes=3000)
    with opened(tmp_path) as (store, _):
        for commit in life.commits(100):
            perform(store, commit)
        there = segments_of(tmp_path / "log")
        needed = {tree.segment for tree in store._trees.values()}
        assert there[-1] > 10, "many were written"
        assert {*there[:-2]} <= needed


def test_trees_in_memory_die_with_the_process_and_their_prompts_wait_again(tmp_path):
    commits = Life().commits(30)
    with opened(tmp_path, on_disk=False) as (store, _):
        for commit in commits:
            perform(store, commit)
        for lease_id, tree in commits[-1].kept.items():
            assert store.read(lease_id) == tree.frames
        assert not any(b"tree" in file.read_bytes() for file in (tmp_path / "log").iterdir())
    with opened(tmp_path, on_disk=False) as (store, state):
        before = {row.prompt_index: row for row in commits[-1].state.rows}
        accepted = {i for i, row in before.items() if row.state == State.ACCEPTED}
        after = {row.prompt_index: row for row in state.rows}
        assert accepted
        assert all(after[i] == before[i] for i in before.keys() - accepted)
        again = [Entry.of(after[i]) for i in accepted]
        assert {(e.state, e.tries, e.failed, e.oldest_step) for e in again} == {
            (State.WAITING, 0, (), None)
        }
        assert all(after[i].attempt == before[i].attempt for i in accepted), "none is given twice"
        assert state.counts.reasons["tree_lost"] == len(accepted)
        assert store.num_bytes == 0
        state.check()


def test_the_log_is_on_disk_whole_before_the_index_learns_of_it(tmp_path, monkeypatch):
    sync, seen = os.fdatasync, []
    with opened(tmp_path) as (store, _), closing(Index.open(store.paths.index)) as reader:

        def fdatasync(descriptor):
            seen.append((os.fstat(descriptor).st_size, reader.position().sequence))
            sync(descriptor)

        monkeypatch.setattr(os, "fdatasync", fdatasync)
        for commit in Life().commits(3):
            sequence = reader.position().sequence
            store.commit(commit.changes, commit.trees)
            assert seen[-1] == (newest(tmp_path).stat().st_size, sequence)
            assert reader.position().sequence == sequence + 1


# ------------------------------------------------------------------ runs


def test_another_run_goes_on_at_its_checkpoint_and_that_is_kept(tmp_path):
    commits = live(tmp_path, 40)
    step = commits[-1].state.counts.num_retired
    with opened(tmp_path, "second", resume_step=step) as (_, state):
        assert state == commits[-1].state.resumed_at(step)
        assert state.counts.published == step
    with opened(tmp_path, "second", resume_step=step + 1) as (_, again):
        assert comparable(again) == comparable(state), "its own state, whatever the step"
    lose_index(tmp_path)
    with opened(tmp_path, "second") as (_, again):
        assert comparable(again) == comparable(state), "the log knows it too"


def test_a_run_cannot_go_on_where_the_queue_never_was_and_may_be_tried_again(tmp_path):
    commits = live(tmp_path, 5)
    with (
        pytest.raises(DataError, match="can go on from policy steps"),
        opened(tmp_path, "second", resume_step=900),
    ):
        pass
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])


def test_a_folder_has_one_writer_whose_process_is_named(tmp_path):
    with (
        opened(tmp_path),
        pytest.raises(ConfigError, match="end it first"),
        opened(tmp_path),
    ):
        pass
    with opened(tmp_path) as (_, state):
        assert state == QueueState()


# ------------------------------------------------------------------ disks that say no


@pytest.mark.parametrize("point", ["replay.write", "replay.before_sync", "replay.after_sync"])
def test_a_commit_that_fails_leaves_everything_as_it_was_and_succeeds_later(
    tmp_path, monkeypatch, point
):
    *before, last = Life().commits(20)
    with opened(tmp_path) as (store, _):
        for commit in before:
            perform(store, commit)
        log = {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()}
        with monkeypatch.context() as patch:
            patch.setattr(chaos, "point", _full_disk(point))
            for _ in range(3):
                with pytest.raises(OSError, match="no room"):
                    store.commit(last.changes, last.trees)
        assert {file.name: file.read_bytes() for file in (tmp_path / "log").iterdir()} == log
        with opened(image_of := image(tmp_path)) as (other, state):
            check_same(other, state, before[-1])
        shutil.rmtree(image_of)
        perform(store, last)
    with opened(tmp_path) as (store, state):
        check_same(store, state, last)


def _full_disk(where):
    def point(name):
        if name == where:
            raise OSError(28, "no room")

    return point


def test_writes_that_the_system_takes_in_small_parts_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "point", lambda name: "short" if name == "replay.write" else None)
    commits = live(tmp_path, 20)
    monkeypatch.undo()
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])


def test_a_write_cut_short_by_a_real_limit_is_taken_back(tmp_path):
    tree = NewTree("000000000", 1, 1, [bytes(10_000)])
    with opened(tmp_path, segment_bytes=2**20) as (store, _):
        store.commit(None, [tree])
        size = newest(tmp_path).stat().st_size
        with file_size_limit(size + 5000), pytest.raises(OSError, match="File too large"):
            store.commit(None, [tree._replace(lease_id="000000001")])
        assert newest(tmp_path).stat().st_size == size
        assert not store.holds("000000001")
        store.commit(None, [tree._replace(lease_id="000000001")])
        assert store.read("000000001") == tree.frames


@contextlib.contextmanager
def file_size_limit(num_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_new_segment_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch):
    commits = live(tmp_path, 5)
    there = segments_of(tmp_path / "log")
    with opened(tmp_path) as (store, _):
        with monkeypatch.context() as patch:
            patch.setattr(chaos, "point", _full_disk("replay.write"))
            with pytest.raises(OSError, match="no room"):
                store.commit(None)
        assert segments_of(tmp_path / "log") == there
        store.commit(None)
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])


# ------------------------------------------------------------------ damage


def test_a_torn_end_is_cut_off(tmp_path, capsys):
    commits = live(tmp_path, 10)
    whole = newest(tmp_path).read_bytes()
    newest(tmp_path).write_bytes(whole + b"half a record")
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])
        assert "torn end" in capsys.readouterr().out
        assert newest(tmp_path).read_bytes() == whole


def test_a_damaged_tree_goes_to_quarantine_and_is_held_no_more(tmp_path, capsys):
    commits = live(tmp_path, 10)
    lease_id = min(commits[-1].kept)
    with opened(tmp_path) as (store, _):
        place = store._trees[int(lease_id)].place
        flip(file_of(tmp_path / "log", place.segment), place.end - 1)
        with pytest.raises(DamagedTreeError, match=lease_id):
            store.read(lease_id)
        assert not store.holds(lease_id)
        (kept,) = (tmp_path / "quarantine").iterdir()
        assert kept.stat().st_size == place.length
        assert "a stored tree is damaged" in capsys.readouterr().out
        again = commits[-1].kept[lease_id]
        store.commit(None, [again])
        assert store.read(lease_id) == again.frames, "grown again, it is whole"
        store.commit(None)
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])


def test_trees_whose_file_is_gone_wait_again(tmp_path):
    commits = live(tmp_path, 10)
    for file in (tmp_path / "log").iterdir():
        file.unlink()
    with opened(tmp_path) as (store, state):
        assert not any(store.holds(lease_id) for lease_id in commits[-1].kept)
        assert State.ACCEPTED not in {row.state for row in state.rows}
        assert state.counts.next_index == commits[-1].state.counts.next_index
    with opened(tmp_path) as (_, again):
        assert comparable(again) == comparable(state)


def test_a_note_that_a_power_cut_left_without_its_tree_brings_the_prompt_back(tmp_path, capsys):
    folder, images = tmp_path / "replay", {}
    life = Life()
    with opened(folder) as (store, _):
        life.queue.lease(0.0)
        life.queue.accept("000000000", 1, oldest_step=0, has_spread=True, is_scored=True)
        with images_of_commit(folder, images):
            tree = NewTree("000000000", 1, 1, [bytes(range(256))])
            store.commit(life.queue.take_changes(), [tree])
    crashed, _ = images["replay.after_sync"]
    file = newest(crashed)
    flip(file, file.read_bytes().index(tree.frames[0]))
    with opened(crashed) as (store, state):
        assert [row.state for row in state.rows] == [State.WAITING]
        assert not store.holds("000000000")
        assert "their prompts wait again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["index.sqlite", "index.sqlite-wal"])
@pytest.mark.parametrize("how", ["gone", "empty", "zeros", "text", "half"])
def test_the_index_is_made_anew_where_it_is_damaged(tmp_path, name, how):
    commits = Life().commits(60)
    with opened(tmp_path) as (store, _):
        for commit in commits:
            perform(store, commit)
        folder = image(tmp_path)
    file = folder / name
    size = file.stat().st_size
    match how:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "zeros":
            file.write_bytes(bytes(size))
        case "text":
            file.write_bytes(b"no such thing" * 1000)
        case "half":
            file.write_bytes(file.read_bytes()[: size // 2])
    with opened(folder) as (store, state):
        check_same(store, state, commits[-1])


def test_a_row_that_changed_on_disk_is_not_believed(tmp_path, capsys):
    commits = live(tmp_path, 20)
    database = Index.open(tmp_path / "index.sqlite")._database
    database.execute("update leases set state = 'dropped' where state = 'accepted'")
    database.close()
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])
    assert "the index of replay is damaged" in capsys.readouterr().out


def test_an_index_copied_back_from_earlier_is_brought_up_to_the_log(tmp_path):
    commits = Life().commits(120)
    with opened(tmp_path) as (store, _):
        for number, commit in enumerate(commits):
            perform(store, commit)
            if number == 30:
                early, there = image(tmp_path), segments_of(tmp_path / "log")
    assert not {*there} & {*segments_of(tmp_path / "log")}, "what it knew of is gone"
    lose_index(tmp_path)
    for file in early.glob("index.sqlite*"):
        shutil.copy(file, tmp_path)
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])


def test_without_an_index_a_tree_is_found_in_whatever_segment_it_lies(tmp_path):
    """One tree in the oldest file, another that is replaced again and again; the files between them are gone."""
    life = Life()
    for lease_id in ("000000000", "000000001"):
        life.queue.lease(0.0)
        life.queue.accept(lease_id, 1, oldest_step=0, has_spread=True, is_scored=True)
    first = NewTree("000000000", 1, 1, [b"first"])
    with opened(tmp_path) as (store, _):
        store.commit(life.queue.take_changes(), [first])
        for attempt in range(1, 40):
            last = NewTree("000000001", attempt, attempt, [bytes([attempt]) * 500])
            store.commit(None, [last])
            store.forget([])
    there = segments_of(tmp_path / "log")
    assert there[0] == 1
    assert there[1] > 2
    lose_index(tmp_path)
    with opened(tmp_path) as (store, state):
        assert comparable(state) == comparable(life.queue.state())
        assert store.read("000000000") == first.frames
        assert store.read("000000001") == last.frames


def test_without_an_index_a_damaged_note_is_made_up_for_by_the_next_snapshot(tmp_path):
    commits = live(tmp_path, 30)
    lose_index(tmp_path)
    second = segments_of(tmp_path / "log")[-2]
    *_, note, _ = (f for f in scan(tmp_path / "log", second) if f.kind is Kind.NOTE)
    flip(file_of(tmp_path / "log", second), note.place.end - 1)
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])
    assert [file.name for file in (tmp_path / "quarantine").iterdir()] == [
        f"{second:08d}-{note.place.offset}.bin"
    ]


def test_without_an_index_a_torn_end_is_kept_since_it_may_have_been_answered_for(tmp_path):
    commits = live(tmp_path, 3)
    lose_index(tmp_path)
    *_, note = scan(tmp_path / "log", 1)
    flip(newest(tmp_path), note.place.end - 1)
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-2])
    (kept,) = (tmp_path / "quarantine").iterdir()
    assert kept.stat().st_size >= note.place.length


def test_a_log_of_which_nothing_can_be_read_is_not_taken_for_the_beginning(tmp_path):
    live(tmp_path, 10)
    lose_index(tmp_path)
    for file in (tmp_path / "log").iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError, match="away and begin anew"), opened(tmp_path):
        pass


def test_a_segment_whose_beginning_was_torn_leaves_no_file(tmp_path):
    commits = live(tmp_path, 10)
    there = segments_of(tmp_path / "log")
    file_of(tmp_path / "log", there[-1] + 1).write_bytes(newest(tmp_path).read_bytes()[:100])
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])
        assert segments_of(tmp_path / "log") == there


def test_a_start_reads_nothing_of_the_log_that_the_index_speaks_for(tmp_path):
    commits = live(tmp_path, 10)
    for file in (tmp_path / "log").iterdir():
        flip(file, 9)
    with opened(tmp_path) as (store, state):
        check_same(store, state, commits[-1])
    assert not (tmp_path / "quarantine").exists()


def test_without_an_index_a_damaged_note_is_refused_and_not_guessed(tmp_path):
    live(tmp_path, 3)
    lose_index(tmp_path)
    file = file_of(tmp_path / "log", 1)
    flip(file, file.read_bytes().index(b'"run"', 700))
    for _ in range(2):
        with pytest.raises(DataError, match="or the log back from a copy"), opened(tmp_path):
            pass


# ------------------------------------------------------------------ at random


@contextlib.contextmanager
def images_of_commit(folder, where):
    """Within, the folder is copied whenever a process could die: at each point, with what was on disk for certain."""
    sizes = {file.name: file.stat().st_size for file in (folder / "log").iterdir()}

    def point(name):
        where[name] = (image(folder), dict(sizes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaos, "point", point)
        yield


def tear(folder, sizes, chance):
    """Of what was written and not synced, a power cut keeps any sectors."""
    for file in (folder / "log").iterdir():
        data, safe = file.read_bytes(), sizes.get(file.name, 0)
        end = chance.randint(safe, len(data))
        torn = bytearray(data[:end])
        if chance.random() < 0.5:
            torn = bytearray(data)
            for start in range(safe, len(data), SECTOR):
                if chance.random() < 0.5:
                    part = slice(max(safe, start), start + SECTOR)
                    torn[part] = bytes(len(torn[part]))
        file.write_bytes(torn)


def reopened(commit, there):
    """The commit's state, in which accepted entries without a tree wait."""
    return tuple(
        row
        if row.state != State.ACCEPTED or there(Entry(row.prompt_index).lease_id)
        else row._replace(state="waiting", failed=(), oldest_step=None, uncounted=row.attempt)
        for row in commit.state.rows
    )


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    number=st.integers(1, 25),
    where=st.sampled_from(["replay.before_sync", "replay.after_sync", "replay.after_index"]),
    lost=st.sampled_from(["nothing", "index", "newer index"]),
)
def test_a_crash_at_any_place_gives_the_last_answered_commit_or_the_one_after(
    seed, number, where, lost
):
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder, images, chance = Path(scratch) / "replay", {}, random.Random(seed)
        life = Life(seed)
        *before, last = life.commits(number + 1)
        with opened(folder) as (store, _):
            for at, commit in enumerate(before):
                perform(store, commit)
                if at == number // 2:
                    early = image(folder)
            with images_of_commit(folder, images):
                store.commit(last.changes, last.trees)
        crashed, sizes = images[where]
        if where == "replay.before_sync":
            tear(crashed, sizes, chance)
        if lost != "nothing":
            lose_index(crashed)
        if lost == "newer index":
            for file in early.glob("index.sqlite*"):
                shutil.copy(file, crashed)
        following = life.commit()
        with opened(crashed) as (store, state):
            found = check_one_of(store, state, before[-1], last, where)
            if found is last:
                perform(store, following)
        if found is last:
            with opened(crashed) as (store, state):
                check_same(store, state, following)


def check_one_of(store, state, answered, last, where):
    """Whatever was answered is there; of the commit in flight all or nothing, or its trees are not."""
    if where != "replay.before_sync":
        check_same(store, state, last)
        return last
    if comparable(state) == comparable(answered.state):
        check_same(store, state, answered)
        return answered
    assert state.rows == reopened(last, store.holds)
    state.check()
    in_flight = {tree.lease_id for tree in last.trees}
    is_whole = True
    for lease_id, tree in last.kept.items():
        try:
            assert store.read(lease_id) == tree.frames
        except (KeyError, DamagedTreeError):
            assert lease_id in in_flight
            is_whole = False
    return last if is_whole else None


def test_an_answer_before_the_sync_would_be_noticed(tmp_path):
    """The check of crashes is one that can fail: an index that is ahead of a log that lost its end."""
    commits = Life().commits(40)
    at = next(i for i in count(10) if any(t.lease_id in commits[i].kept for t in commits[i].trees))
    images = {}
    with opened(tmp_path / "replay") as (store, _):
        for commit in commits[:at]:
            perform(store, commit)
        with images_of_commit(tmp_path / "replay", images):
            store.commit(commits[at].changes, commits[at].trees)
    folder, sizes = images["replay.after_index"]
    for file in (folder / "log").iterdir():
        with file.open("r+b") as unsynced:
            unsynced.truncate(sizes.get(file.name, 0))
    with opened(folder) as (store, state), pytest.raises(AssertionError):
        check_same(store, state, commits[at])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), num_flips=st.integers(1, 4), is_lost=st.booleans())
def test_flipped_bytes_never_give_a_wrong_tree_or_a_wrong_state(seed, num_flips, is_lost):
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch:
        folder, chance = Path(scratch) / "replay", random.Random(seed)
        *_, last = live(folder, 20, seed=seed)
        if is_lost:
            lose_index(folder)
        files = [*(folder / "log").iterdir()]
        if not is_lost and chance.random() < 0.5:
            files = [folder / "index.sqlite"]
        for _ in range(num_flips):
            file = chance.choice(files)
            flip(file, chance.randrange(file.stat().st_size))
        try:
            with opened(folder) as (store, state):
                if not is_lost:
                    assert state.rows == reopened(last, store.holds)
                check_no_wrong_tree(store, last)
        except DataError:
            assert is_lost, "one of the two is whole"


def check_no_wrong_tree(store, commit):
    for lease_id, tree in commit.kept.items():
        if store.holds(lease_id) and store.digest_of(lease_id) == (tree.attempt, tree.digest):
            with contextlib.suppress(DamagedTreeError):
                assert store.read(lease_id) == tree.frames
