import shutil
import threading

import numpy as np
import pytest
from safetensors.numpy import load_file

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    Probe,
    TensorInfo,
    hash_tensors,
    read_tensors,
    verify,
)
from treepo_async.weights.store import NamedTensor, WeightStore, write_tensors

SIZE = 64
EXPECTED = {"w": TensorInfo("F32", (SIZE,))}


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"hidden_size": 4}')
    return file


@pytest.fixture
def store(tmp_path):
    return WeightStore(tmp_path / "weights", keep=3)


def tensor(value):
    return NamedTensor("w", TensorInfo("F32", (SIZE,)), np.full(SIZE, value, np.float32).tobytes())


def publish(store, config_file, step, *, evaluate=False, tensors=None, lineage=0):
    return store.publish(
        PolicyVersion(lineage, step),
        [tensor(step)] if tensors is None else tensors,
        config_file=config_file,
        probe=Probe([], []),
        evaluate=evaluate,
    )


def steps(store):
    return [version.step for version in store.versions()]


def test_a_publication_holds_weights_manifest_and_config(store, config_file):
    folder = publish(store, config_file, 4)
    assert folder == store.path(PolicyVersion(0, 4))
    assert {entry.name for entry in folder.iterdir()} == {WEIGHTS_FILE, MANIFEST_FILE, "config.json"}  # fmt: skip
    assert (folder / "config.json").read_text() == config_file.read_text()
    np.testing.assert_array_equal(load_file(folder / WEIGHTS_FILE)["w"], np.full(SIZE, 4))


def test_brain_floats_are_written_as_they_are(store, config_file):
    data = bytes(range(24))
    brain = NamedTensor("b", TensorInfo("BF16", (3, 4)), data)
    folder = publish(store, config_file, 1, tensors=[brain])
    verify(folder, {"b": brain.info})
    assert (folder / WEIGHTS_FILE).read_bytes().endswith(data)


def test_nothing_is_listed_before_it_is_complete(store, config_file):
    seen = []

    def slowly():
        yield tensor(0)
        seen.append(steps(store))
        yield NamedTensor("late", TensorInfo("F32", (1,)), bytes(4))
        seen.append(steps(store))

    publish(store, config_file, 1, tensors=slowly())
    assert seen == [[], []]
    assert steps(store) == [1]


def test_a_publication_that_failed_half_way_is_never_listed_and_can_be_made_anew(
    store, config_file
):
    with pytest.raises(KeyError):
        publish(store, config_file, 1, tensors=[NamedTensor("w", TensorInfo("F99", (1,)), b"")])
    with pytest.raises(OSError, match="no-such-config"):
        publish(store, config_file.with_name("no-such-config"), 1)
    assert steps(store) == []
    assert store.next_after(PolicyVersion(0, 0)) is None
    verify(publish(store, config_file, 1), EXPECTED)


def test_a_reader_meets_complete_publications_only_while_they_come_and_go(store, config_file):
    """Every folder listed under its name is whole; one that is gone again is gone as a whole."""
    done, failures, num_read = threading.Event(), [], [0]

    def read():
        while not done.is_set():
            for version in store.versions():
                try:
                    names = list(store.path(version).iterdir())
                except FileNotFoundError:
                    continue
                num_read[0] += 1
                if len(names) < 3 and store.path(version).exists():
                    failures.append((version, names))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(1, 60):
            publish(store, config_file, step)
    finally:
        done.set()
        reader.join(10)
    assert failures == []
    assert num_read[0] > 10


def test_the_newest_few_are_kept(store, config_file):
    for step in range(1, 12):
        publish(store, config_file, step)
        assert steps(store) == list(range(max(1, step - 2), step + 1)), "9 comes before 10"
    assert {entry.name for entry in store.folder.iterdir()} == {"0.9", "0.10", "0.11"}


def test_a_later_lineage_is_newer_than_any_step_of_an_earlier_one(store, config_file):
    publish(store, config_file, 7)
    publish(store, config_file, 2, lineage=1)
    assert store.next_after(PolicyVersion(0, 7)) == PolicyVersion(1, 2)
    assert store.next_after(PolicyVersion(1, 2)) is None


def test_a_writer_that_was_followed_by_a_later_lineage_publishes_nothing(store, config_file):
    publish(store, config_file, 2, lineage=1)
    with pytest.raises(
        WeightsError, match=r"0\.9 is not published: lineage 0 was rolled back, 1\.2"
    ):
        publish(store, config_file, 9)
    assert store.versions() == [PolicyVersion(1, 2)]
    assert [entry.name for entry in store.folder.iterdir()] == ["1.2"], "nor is anything left"


def test_what_it_had_begun_before_comes_too_late_for_whoever_has_a_later_one(store, config_file):
    later = WeightStore(store.folder, keep=3)

    def overtaken():
        yield tensor(1)
        publish(later, config_file, 2, lineage=1)

    # the one that came first takes what the other has half written for a leftover
    with pytest.raises(FileNotFoundError):
        publish(store, config_file, 9, tensors=overtaken())
    assert store.next_after(PolicyVersion(0, 8)) == PolicyVersion(1, 2)
    publish(store, config_file, 3, lineage=1)
    assert store.next_after(PolicyVersion(1, 2)) == PolicyVersion(1, 3)


def test_a_version_is_written_once(store, config_file):
    folder = publish(store, config_file, 1)
    before = (folder / WEIGHTS_FILE).read_bytes()
    with pytest.raises(WeightsError, match="published already"):
        publish(store, config_file, 1, tensors=[tensor(99)])
    assert (folder / WEIGHTS_FILE).read_bytes() == before


def test_the_newest_version_is_next(store, config_file):
    assert store.next_after(PolicyVersion(0, 0)) is None
    for step in (1, 2, 3):
        publish(store, config_file, step)
    assert store.next_after(PolicyVersion(0, 0)) == PolicyVersion(0, 3)
    assert store.next_after(PolicyVersion(0, 3)) is None


def test_none_to_be_evaluated_is_passed_over(store, config_file):
    for step, evaluate in [(1, False), (2, True), (3, False)]:
        publish(store, config_file, step, evaluate=evaluate)
    assert store.next_after(PolicyVersion(0, 0)) == PolicyVersion(0, 2)
    assert store.next_after(PolicyVersion(0, 2)) == PolicyVersion(0, 3)


def test_a_version_without_a_readable_manifest_is_left_to_verify(store, config_file):
    for step in (1, 2, 3):
        publish(store, config_file, step)
    (store.path(PolicyVersion(0, 2)) / MANIFEST_FILE).write_text("{")
    version = store.next_after(PolicyVersion(0, 0))
    assert version == PolicyVersion(0, 2)
    with pytest.raises(WeightsError, match="is no manifest"):
        verify(store.path(version), EXPECTED)
    assert store.next_after(version) == PolicyVersion(0, 3)


def test_opening_a_store_again_finds_what_is_there(store, config_file):
    publish(store, config_file, 5)
    again = WeightStore(store.folder, keep=1)
    assert again.versions() == [PolicyVersion(0, 5)]
    assert Manifest.read(again.path(PolicyVersion(0, 5))).version == "0.5"


def test_the_newest_of_those_to_be_evaluated_are_kept_besides(tmp_path, config_file):
    store = WeightStore(tmp_path / "weights", keep=2, keep_marked=2)
    for step in range(1, 10):
        publish(store, config_file, step, evaluate=step % 2 == 0)
    assert steps(store) == [4, 6, 8, 9]


def test_with_marked_only_no_other_version_comes_next(store, config_file):
    publish(store, config_file, 1)
    assert store.next_after(PolicyVersion(0, 0), marked_only=True) is None
    publish(store, config_file, 2, evaluate=True)
    publish(store, config_file, 3)
    assert store.next_after(PolicyVersion(0, 0), marked_only=True) == PolicyVersion(0, 2)
    assert store.next_after(PolicyVersion(0, 2), marked_only=True) is None


def test_what_cannot_be_removed_is_told_of_and_fails_no_publication(
    store, config_file, monkeypatch
):
    told = []
    again = WeightStore(store.folder, keep=1, unremoved=told.append)
    publish(again, config_file, 1)
    (store.folder / ".old-0.1").mkdir()
    (store.folder / ".old-0.1" / "held").touch()
    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert publish(again, config_file, 2) == again.path(PolicyVersion(0, 2))
    assert steps(again) == [1, 2], "and none is half removed"
    assert len(told) == 2
    monkeypatch.undo()
    publish(again, config_file, 3)
    assert [entry.name for entry in store.folder.iterdir()] == ["0.3"]
    assert len(told) == 2


def refuse(folder):
    raise OSError(5, "Input/output error", str(folder))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([NamedTensor("a", TensorInfo("F32", (3,)), bytes(8))], "tensor a has 8 bytes, .* has 12"),
        (
            [NamedTensor("a", TensorInfo("F32", (1,)), bytes(4))] * 2,
            "of 3 tensors only 2 have names",
        ),
    ],
    ids=["size", "name"],
)
def test_tensors_that_are_not_what_they_say_are_refused_and_their_file_is_read_by_nobody(
    tmp_path, tensors, message
):
    file = tmp_path / "model.safetensors"
    good = NamedTensor("b", TensorInfo("F32", (2,)), bytes(8))
    with pytest.raises(WeightsError, match=message):
        write_tensors(file, [good, *tensors])
    with pytest.raises(WeightsError, match="no safetensors file"):
        read_tensors(file)


def test_many_tensors_written_at_a_time_come_back_as_safetensors_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.normal(size=(i % 5, i)).astype(np.float32) for i in range(40)}
    tensors = [NamedTensor(n, TensorInfo("F32", a.shape), a.tobytes()) for n, a in arrays.items()]
    file = tmp_path / "model.safetensors"
    hashes = write_tensors(file, tensors)
    found = load_file(file)
    assert list(read_tensors(file)) == list(arrays)
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())
    assert hashes == hash_tensors(file)
