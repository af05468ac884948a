import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import numpy as np
import pytest

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights import checkpoints as module
from treepo_async.weights.checkpoints import Checkpoint, CheckpointStore, TrainingState
from treepo_async.weights.manifest import TensorInfo, read_tensors
from treepo_async.weights.store import NamedTensor

ROOT = Path(__file__).resolve().parents[2]


def state(version="0.10"):
    return TrainingState(version, 9, "tp4pp2", "00ff", [[1, 2, 3]])


def tensors(fill):
    data = np.full((2, 3), fill, np.float32).tobytes()
    return [NamedTensor("model.weight", TensorInfo("F32", (2, 3)), data)]


def saved(store, version, fill=1.0):
    return store.save(state(version), [("weights", tensors(fill)), ("exp_avg", tensors(-fill))])


def unexpected(error):
    raise AssertionError(error)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_a_checkpoint_is_read_back_as_it_was_written(store):
    folder = saved(store, "0.10")
    found = store.newest(unexpected)
    assert found == Checkpoint.read(folder)
    assert found.state == state()
    assert found.state.policy_version == PolicyVersion(0, 10)
    assert set(found.hashes) == {"weights.safetensors", "exp_avg.safetensors"}
    assert read_tensors(folder / "exp_avg.safetensors") == {
        "model.weight": TensorInfo("F32", (2, 3))
    }


def test_without_any_there_is_none(store):
    assert store.newest(unexpected) is None
    assert store.versions() == []


def test_the_newest_is_the_one_of_the_newest_lineage(store):
    for version in ("0.20", "0.30", "1.21"):
        saved(store, version)
    assert store.newest(unexpected).state.version == "1.21"


def test_the_newest_few_are_kept(store):
    for version in ("0.10", "0.20", "0.30"):
        saved(store, version)
    assert [str(version) for version in store.versions()] == ["0.20", "0.30"]
    assert len(list(store.folder.iterdir())) == 2


def test_a_step_is_covered_that_every_kept_checkpoint_has_reached(store):
    covered = [store.covered_step()]
    for version in ("0.10", "0.20", "0.30", "1.25"):
        saved(store, version)
        covered.append(store.covered_step())
    assert covered == [None, None, 10, 20, 25], "none, too few, the older of two"
    flip_a_bit(store.folder / "1.25")
    assert store.covered_step() is None, "a damaged one covers nothing"
    saved(store, "1.35")
    assert store.covered_step() == 30


def test_a_version_is_never_written_twice(store):
    saved(store, "0.10")
    with pytest.raises(WeightsError, match="never rewritten"):
        saved(store, "0.10")


def test_what_was_left_of_a_write_that_was_cut_off_is_no_checkpoint(store):
    saved(store, "0.10")
    shutil.copytree(store.folder / "0.10", store.folder / ".0.20")
    assert store.newest(unexpected).state.version == "0.10"
    saved(store, "0.20", fill=3.0)
    assert store.newest(unexpected).state.version == "0.20"


def test_what_a_killed_writer_left_goes_with_the_next_save_and_what_is_not_ours_stays(store):
    saved(store, "0.10")
    (store.folder / ".0.20").mkdir()
    (store.folder / ".old-0.5").mkdir()
    (store.folder / "0.10.bak").mkdir()
    saved(store, "1.20")
    assert {entry.name for entry in store.folder.iterdir()} == {"0.10", "1.20", "0.10.bak"}
    assert [str(version) for version in store.versions()] == ["0.10", "1.20"]


def test_slow_work_is_done_apart_and_no_tensor_is_asked_for_in_it(store):
    doing, asked = [], []

    def apart(work):
        doing.append(True)
        work()
        doing.pop()

    def gathered(kind):
        for tensor in tensors(1.0):
            asked.append((kind, list(doing)))
            yield tensor

    kinds = [(kind, gathered(kind)) for kind in ("weights", "exp_avg")]
    store.save(state(), kinds, apart=apart)
    assert asked == [("weights", []), ("exp_avg", [])]
    store.newest(unexpected).verify()


def cut_short(folder):
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(folder):
    file = folder / "exp_avg.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def remove_a_file(folder):
    (folder / "weights.safetensors").unlink()


def remove_the_manifest(folder):
    (folder / "manifest.json").unlink()


def rename_the_version(folder):
    file = folder / "manifest.json"
    raw = json.loads(file.read_text())
    raw["state"]["version"] = "0.19"
    file.write_text(json.dumps(raw))


def forget_a_file(folder):
    file = folder / "manifest.json"
    raw = json.loads(file.read_text())
    del raw["hashes"]["weights.safetensors"]
    file.write_text(json.dumps(raw))


def change_a_number(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text().replace('"num_updates": 9', '"num_updates": 8'))


def cut_the_manifest(folder):
    file = folder / "manifest.json"
    file.write_text(file.read_text()[:-5])


def empty_a_file(folder):
    (folder / "exp_avg.safetensors").write_bytes(b"")


def replace_a_file_by_a_folder(folder):
    (folder / "exp_avg.safetensors").unlink()
    (folder / "exp_avg.safetensors").mkdir()


def exchange_two_files(folder):
    (folder / "exp_avg.safetensors").rename(folder / "kept")
    (folder / "weights.safetensors").rename(folder / "exp_avg.safetensors")
    (folder / "kept").rename(folder / "weights.safetensors")


def drop_a_field(folder):
    file = folder / "manifest.json"
    raw = json.loads(file.read_text())
    del raw["state"]["rng"]
    file.write_text(json.dumps(raw))


DAMAGES = [
    cut_short,
    flip_a_bit,
    empty_a_file,
    remove_a_file,
    replace_a_file_by_a_folder,
    exchange_two_files,
    remove_the_manifest,
    cut_the_manifest,
    rename_the_version,
    change_a_number,
    forget_a_file,
    drop_a_field,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_is_used(store, damage):
    saved(store, "0.10")
    damage(saved(store, "0.20"))
    passed_over = []
    assert store.newest(passed_over.append).state.version == "0.10"
    assert len(passed_over) == 1
    assert "0.20" in str(passed_over[0])


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("same_process", [True, False], ids=["same-writer", "later-writer"])
def test_a_damaged_checkpoint_takes_no_whole_ones_place(store, damage, same_process):
    saved(store, "0.10")
    damage(saved(store, "0.20"))
    writer = store if same_process else CheckpointStore(store.folder, keep=2)
    saved(writer, "0.30")
    assert [str(version) for version in store.versions()] == ["0.10", "0.20", "0.30"]
    damage(store.folder / "0.30")
    assert store.newest(lambda error: None).state.version == "0.10"


def test_a_damaged_checkpoint_goes_when_it_is_older_than_those_kept(store):
    saved(store, "0.10")
    cut_short(saved(store, "0.20"))
    for version in ("0.30", "0.40"):
        saved(store, version)
    assert [str(version) for version in store.versions()] == ["0.30", "0.40"]


def test_a_damaged_one_that_is_alone_makes_way_for_the_next(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    saved(store, "0.10")
    flip_a_bit(saved(store, "0.20"))
    assert store.newest(lambda error: None) is None
    saved(store, "1.11")
    assert store.newest(unexpected).state.version == "1.11"
    assert [str(version) for version in store.versions()] == ["1.11"]


def test_only_what_was_touched_since_it_was_written_is_read_again(store, monkeypatch):
    hashed, really = [], module.hash_file

    def watched(file):
        hashed.append(file.parent.name)
        return really(file)

    monkeypatch.setattr(module, "hash_file", watched)
    for version in ("0.10", "0.20", "0.30"):
        saved(store, version)
    assert set(hashed) == {".0.10", ".0.20", ".0.30"}
    os.utime(store.folder / "0.30" / "weights.safetensors")
    saved(store, "0.40")
    assert set(hashed) - {".0.10", ".0.20", ".0.30"} == {".0.40", "0.30"}


def test_a_disk_that_is_full_costs_the_checkpoint_alone_and_is_told_of(tmp_path):
    """In a process that may write files of 600 kB only: a real write fails, as on a full disk."""
    folder = tmp_path / "checkpoints"
    saved(CheckpointStore(folder, keep=2), "0.10")
    code = textwrap.dedent(
        f"""
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from tests.weights.test_checkpoints import CheckpointStore, Path, large, state
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))
        store = CheckpointStore(Path({str(folder)!r}), keep=2)
        store.save(state("0.20"), [("weights", large()), ("exp_avg", large())])
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("treepo_async.errors.WeightsError: checkpoint ")
    assert "0.20 cannot be written: File too large" in last
    assert "nothing of it is left, 0.10 is the newest there is" in last
    assert [entry.name for entry in folder.iterdir()] == ["0.10"]
    store = CheckpointStore(folder, keep=2)
    assert store.newest(unexpected).state.version == "0.10"
    store.save(state("0.20"), [("weights", large()), ("exp_avg", large())])
    assert store.newest(unexpected).state.version == "0.20"


def test_leftovers_that_cannot_be_removed_are_told_of_and_cost_no_checkpoint(tmp_path, monkeypatch):
    def refuse(folder):
        raise OSError(errno.EBUSY, "in use", str(folder))

    monkeypatch.setattr(module, "remove_leftovers", refuse)
    told = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, unremoved=told.append)
    saved(store, "0.10")
    assert [error.errno for error in told] == [errno.EBUSY]
    assert store.newest(unexpected).state.version == "0.10"


def test_what_could_not_be_removed_once_goes_with_the_next_save(tmp_path):
    told = []
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, unremoved=told.append)
    saved(store, "0.10")
    # a folder of this name is in the way of what 0.10 is renamed to
    in_the_way = store.folder / ".old-0.10"

    def blocked():
        yield from tensors(1.0)
        in_the_way.mkdir()
        (in_the_way / "file").touch()

    store.save(state("0.20"), [("weights", blocked())])
    assert [error.errno for error in told] == [errno.ENOTEMPTY]
    assert {entry.name for entry in store.folder.iterdir()} == {".old-0.10", "0.10", "0.20"}
    saved(store, "0.30")
    assert {entry.name for entry in store.folder.iterdir()} == {"0.30"}
    assert len(told) == 1


def test_the_kinds_that_are_asked_for_are_compared_and_no_others(store):
    folder = saved(store, "0.10")
    (folder / "exp_avg.safetensors").write_bytes(b"")
    assert store.newest(unexpected, kinds=["weights"]).folder == folder
    with pytest.raises(WeightsError, match=r"exp_avg\.safetensors is damaged"):
        store.at(PolicyVersion(0, 10), kinds=["weights", "exp_avg"])
    with pytest.raises(WeightsError, match=r"0\.10 has no other\.safetensors"):
        store.at(PolicyVersion(0, 10), kinds=["other"])
    (folder / "weights.safetensors").write_bytes(b"")
    told = []
    assert store.newest(told.append, kinds=["weights"]) is None
    assert len(told) == 1


def test_one_that_is_removed_while_it_is_read_makes_way_for_one_that_was_saved_meanwhile(
    tmp_path, monkeypatch
):
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    saved(store, "0.10")

    def saves_meanwhile(folder):
        if folder.name == "0.10":
            saved(CheckpointStore(store.folder, keep=1), "0.20")
        return read(folder)

    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", saves_meanwhile)
    assert CheckpointStore(store.folder, keep=1).newest(unexpected).state.version == "0.20"


def test_what_goes_wrong_while_tensors_are_gathered_is_not_blamed_on_the_disk(store):
    def gathered():
        yield from tensors(1.0)
        raise OSError(errno.EIO, "a peer is gone")

    with pytest.raises(OSError, match="a peer is gone"):
        store.save(state("0.20"), [("weights", gathered())])
    assert store.newest(unexpected) is None


KILL_POINTS = {
    "weights: first tensor": "0.10",
    "weights: second tensor": "0.10",
    "weights: file": "0.10",
    "exp_avg: second tensor": "0.10",
    "exp_avg: file": "0.10",
    "publish_folder call": "0.10",
    "rename call": "0.10",
    "rename return": "0.20",
    "_remove_old call": "0.20",
    # of an old one, hidden already: leftovers are removed by another function before anything is written
    "_rmtree_safe_fd call": "0.20",
}
"""Where a writer is killed, and the newest checkpoint there is then."""


@pytest.mark.faults
@pytest.mark.parametrize(("point", "newest"), KILL_POINTS.items())
def test_a_writer_that_is_killed_leaves_the_one_before_or_the_whole_one(tmp_path, point, newest):
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=1)
    saved(store, "0.10")
    writer = multiprocessing.get_context("fork").Process(target=save_and_die, args=(folder, point))
    writer.start()
    writer.join(20)
    assert writer.exitcode == -signal.SIGKILL
    assert store.newest(unexpected).state.version == newest
    saved(store, "0.30")
    assert {entry.name for entry in folder.iterdir()} == {"0.30"}


def save_and_die(folder, point):
    """Save a checkpoint and be killed at a point of it."""

    def at(here):
        if here == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def gathered(kind):
        yield from large()
        at(f"{kind}: first tensor")
        yield from tensors(2.0)
        at(f"{kind}: second tensor")

    def kinds():
        for kind in ("weights", "exp_avg"):
            yield kind, gathered(kind)
            at(f"{kind}: file")

    def watch(frame, event, arg):
        """Called when a function begins or ends."""
        at(f"{frame.f_code.co_name} {event}")
        return watch

    sys.settrace(watch)
    CheckpointStore(folder, keep=1).save(state("0.20"), kinds())


def large():
    """A tensor of 1 MB."""
    data = np.zeros(2**18, np.float32).tobytes()
    return [NamedTensor("large.weight", TensorInfo("F32", (2**18,)), data)]


class Bytes(bytearray):
    """Bytes whose end can be watched."""


def test_one_tensor_is_in_memory_at_a_time(store):
    made, most = [], []

    def gathered():
        for i in range(5):
            data = Bytes(4 * 1000)
            made.append(weakref.ref(data))
            most.append(sum(ref() is not None for ref in made))
            yield NamedTensor(f"t{i}", TensorInfo("F32", (1000,)), data)

    store.save(state(), [("weights", gathered())])
    # the one before lives until the next is there
    assert most == [1, 2, 2, 2, 2]
