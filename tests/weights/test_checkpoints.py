import json
import shutil

import numpy as np
import pytest

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import Checkpoint, CheckpointStore, TrainingState
from treepo_async.weights.manifest import TensorInfo, read_tensors
from treepo_async.weights.store import NamedTensor


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


def drop_a_field(folder):
    file = folder / "manifest.json"
    raw = json.loads(file.read_text())
    del raw["state"]["rng"]
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip_a_bit,
        remove_a_file,
        remove_the_manifest,
        rename_the_version,
        drop_a_field,
    ],
)
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_it_is_used(store, damage):
    saved(store, "0.10")
    damage(saved(store, "0.20"))
    passed_over = []
    assert store.newest(passed_over.append).state.version == "0.10"
    assert len(passed_over) == 1
    assert "0.20" in str(passed_over[0])
