import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Manifest,
    Probe,
    TensorInfo,
    hash_bytes,
    hash_tensors,
    model_tensors,
    read_tensors,
    verify,
)
from treepo_async.weights.store import NamedTensor, WeightStore, write_tensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "embed.weight": RNG.normal(size=(8, 4)).astype(np.float32),
    "norm.weight": np.ones(4, np.float32),
    "head.bias": RNG.normal(size=3).astype(np.float16),
}
DTYPES = {"float32": "F32", "float16": "F16"}
EXPECTED = {name: TensorInfo(DTYPES[str(a.dtype)], a.shape) for name, a in ARRAYS.items()}
PROBE = Probe([[1, 2, 3]], [[-0.5, -0.25]])


def tensors_of(arrays):
    return [
        NamedTensor(name, TensorInfo(DTYPES[str(a.dtype)], a.shape), a.tobytes())
        for name, a in arrays.items()
    ]


def publish(root, arrays=ARRAYS, step=1):
    config_file = root / "config.json"
    config_file.write_text("{}")
    store = WeightStore(root / "weights", keep=3)
    return store.publish(
        PolicyVersion(0, step),
        tensors_of(arrays),
        config_file=config_file,
        probe=PROBE,
        evaluate=False,
    )


@pytest.fixture
def folder(tmp_path):
    return publish(tmp_path)


def rewrite(folder, edit):
    """Change the bytes of the weights file."""
    file = folder / WEIGHTS_FILE
    data = bytearray(file.read_bytes())
    file.write_bytes(edit(data) or data)


def rewrite_manifest(folder, edit):
    file = folder / MANIFEST_FILE
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(edit(raw) or raw))


def test_a_publication_passes_and_gives_its_manifest(folder):
    manifest = verify(folder, EXPECTED)
    assert manifest.version == "0.1"
    assert manifest.tensors == EXPECTED
    assert manifest.probe == PROBE
    assert manifest == Manifest.read(folder)


def test_the_bytes_are_those_that_safetensors_itself_loads(folder):
    found = load_file(folder / WEIGHTS_FILE)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
        assert hash_tensors(folder / WEIGHTS_FILE)[name] == hash_bytes(found[name].tobytes())


def test_a_file_that_safetensors_wrote_is_read_alike(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert read_tensors(tmp_path / "a.safetensors") == EXPECTED


def test_the_tensors_of_a_sharded_model_are_read_together(tmp_path):
    names = list(ARRAYS)
    save_file({n: ARRAYS[n] for n in names[:1]}, tmp_path / "model-1-of-2.safetensors")
    save_file({n: ARRAYS[n] for n in names[1:]}, tmp_path / "model-2-of-2.safetensors")
    assert model_tensors(tmp_path) == EXPECTED


def test_a_folder_without_tensors_is_no_model(tmp_path):
    with pytest.raises(WeightsError, match=r"no \.safetensors file"):
        model_tensors(tmp_path)


def test_a_manifest_of_another_version_is_refused(tmp_path):
    folder = publish(tmp_path, ARRAYS)
    moved = folder.rename(folder.with_name("0.99"))
    with pytest.raises(WeightsError, match=r"0\.99: its manifest is of version 0\.\d+"):
        verify(moved, EXPECTED)


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    arrays = {name: ARRAYS[name] for name in list(ARRAYS)[1:]}
    with pytest.raises(WeightsError, match=r"lacks embed.weight"):
        verify(publish(tmp_path, arrays), EXPECTED)


def test_an_extra_tensor_is_refused_by_name(tmp_path):
    arrays = {**ARRAYS, "rotary.inv_freq": np.ones(2, np.float32)}
    with pytest.raises(WeightsError, match=r"rotary.inv_freq, which the model does not have"):
        verify(publish(tmp_path, arrays), EXPECTED)


@pytest.mark.parametrize(
    "array",
    [ARRAYS["embed.weight"].T.copy(), ARRAYS["embed.weight"].reshape(32), ARRAYS["embed.weight"].astype(np.float16)],
    ids=["transposed", "flat", "half"],
)  # fmt: skip
def test_another_shape_or_dtype_is_refused_by_name(tmp_path, array):
    folder = publish(tmp_path, {**ARRAYS, "embed.weight": array})
    with pytest.raises(WeightsError, match=r"embed.weight as .*F(32|16).*the model has"):
        verify(folder, EXPECTED)


def test_tensors_in_another_order_are_the_same_and_under_each_others_names_are_not(tmp_path):
    one, other = np.arange(4, dtype=np.float32), np.ones(4, np.float32)
    expected = {name: TensorInfo("F32", (4,)) for name in ("a", "b")}
    folder = publish(tmp_path, {"a": one, "b": other})
    write_tensors(folder / WEIGHTS_FILE, tensors_of({"b": other, "a": one}))
    assert verify(folder, expected).version == folder.name
    write_tensors(folder / WEIGHTS_FILE, tensors_of({"a": other, "b": one}))
    with pytest.raises(WeightsError, match="2 tensors are damaged, first a"):
        verify(folder, expected)


def test_a_file_that_differs_from_its_manifest_is_refused(tmp_path, folder):
    other = publish(tmp_path, {**ARRAYS, "norm.weight": np.zeros(4, np.float32)}, step=2)
    shutil.copy(other / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with pytest.raises(WeightsError, match=r"1 tensors are damaged, first norm.weight"):
        verify(folder, EXPECTED)


def test_any_flipped_byte_is_refused_unless_it_changes_no_tensor(folder):
    """Over the whole file: its length, its header and its data."""
    file = folder / WEIGHTS_FILE
    good = file.read_bytes()
    arrays = load_file(file)
    num_refused = 0
    for place in range(len(good)):
        damaged = bytearray(good)
        damaged[place] ^= 0x11
        file.write_bytes(damaged)
        try:
            verify(folder, EXPECTED)
        except WeightsError:
            num_refused += 1
            continue
        found = load_file(file)
        assert all(np.array_equal(found[name], array) for name, array in arrays.items()), place
    data_bytes = sum(a.nbytes for a in ARRAYS.values())
    assert num_refused > data_bytes + 100, "the data, and nearly all of the header"


def test_a_file_cut_anywhere_is_refused(folder):
    file = folder / WEIGHTS_FILE
    good = file.read_bytes()
    for length in range(len(good)):
        file.write_bytes(good[:length])
        with pytest.raises(WeightsError):
            verify(folder, EXPECTED)


def cut_data(data):
    return data[:-1]


def long_header(data):
    return (len(data)).to_bytes(8, "little") + data[8:]


def endless_header(data):
    return b"\xff" * 8 + data[8:]


@pytest.mark.parametrize("edit", [cut_data, long_header, endless_header])
def test_a_file_shorter_than_it_says_is_called_cut_short(folder, edit):
    rewrite(folder, edit)
    with pytest.raises(WeightsError, match="cut short"):
        verify(folder, EXPECTED)


@pytest.mark.parametrize(
    "header",
    [
        "[]", "7", "null", "{", '{"a": 1}', '{"a": {}}', '{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        "[" * 100_000,
    ],
    ids=lambda header: header[:60],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(tmp_path, header):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(16))
    with pytest.raises(WeightsError, match="no safetensors file"):
        read_tensors(file)


def test_missing_files_are_refused_by_name(folder):
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsError, match=WEIGHTS_FILE):
        verify(folder, EXPECTED)
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(WeightsError, match=MANIFEST_FILE):
        verify(folder, EXPECTED)


def without(key):
    return lambda raw: {name: value for name, value in raw.items() if name != key}


NO_MANIFESTS = {
    **{f"without {key}": without(key) for key in ("version", "tensors", "hashes", "probe", "evaluate")},
    "a list": lambda raw: [raw],
    "a list of tensors": lambda raw: {**raw, "tensors": []},
    "a number for a tensor": lambda raw: {**raw, "tensors": {"a": 1}},
    "a number of hashes": lambda raw: {**raw, "hashes": 7},
    "a probe of something else": lambda raw: {**raw, "probe": {"surprise": 1}},
}  # fmt: skip


@pytest.mark.parametrize("edit", NO_MANIFESTS.values(), ids=NO_MANIFESTS)
def test_a_manifest_that_is_none_is_refused(folder, edit):
    rewrite_manifest(folder, edit)
    with pytest.raises(WeightsError, match="is no manifest"):
        verify(folder, EXPECTED)


def test_a_hash_that_is_not_in_the_manifest_counts_as_damage(folder):
    rewrite_manifest(folder, lambda raw: {**raw, "hashes": {}})
    with pytest.raises(WeightsError, match="3 tensors are damaged"):
        verify(folder, EXPECTED)
