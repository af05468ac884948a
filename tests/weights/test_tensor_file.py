import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from treepo_async.errors import WeightsError
from treepo_async.weights.manifest import TensorInfo, hash_tensors, read_tensors
from treepo_async.weights.tensor_file import TensorFileWriter, header_room

RNG = np.random.default_rng(0)
ARRAYS = {
    "embed.weight": RNG.normal(size=(8, 4)).astype(np.float32),
    "norm.bias": RNG.normal(size=3).astype(np.float32),
    "half.weight": RNG.normal(size=(5,)).astype(np.float16),
}
INFOS = {
    name: TensorInfo({"float32": "F32", "float16": "F16"}[str(a.dtype)], a.shape)
    for name, a in ARRAYS.items()
}


def write(file, arrays=ARRAYS, infos=INFOS, **options):
    with TensorFileWriter(file, **options) as writer:
        for name, array in arrays.items():
            data = array.tobytes()
            writer.add(name, infos[name], [data[:5], data[5:]])
    return file


@pytest.fixture
def file(tmp_path):
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("options", [{}, {"room": header_room(INFOS)}], ids=["unknown", "known"])
def test_safetensors_loads_what_was_written_in_pieces(file, options):
    found = load_file(write(file, **options))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert read_tensors(file) == INFOS
    with safe_open(file, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_tensors_have_the_hashes_of_a_file_that_safetensors_wrote(file, tmp_path):
    save_file(ARRAYS, tmp_path / "b.safetensors")
    assert hash_tensors(write(file)) == hash_tensors(tmp_path / "b.safetensors")


def test_known_tensors_take_no_more_room_than_their_header(file):
    room = header_room(INFOS)
    assert write(file, room=room).stat().st_size == 8 + room + sum(
        a.nbytes for a in ARRAYS.values()
    )
    with pytest.raises(WeightsError, match=r"3 tensors takes \d+ bytes, there is room for"):
        write(file, room=room - 8)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6))
def test_any_shapes_come_back(tmp_path_factory, shapes):
    file = tmp_path_factory.mktemp("shapes") / "a.safetensors"
    arrays = {f"t{i}": np.full(shape, i, np.float32) for i, shape in enumerate(shapes)}
    infos = {name: TensorInfo("F32", a.shape) for name, a in arrays.items()}
    found = load_file(write(file, arrays, infos, room=header_room(infos)))
    assert {n: (a.shape, a.tolist()) for n, a in found.items()} == {
        n: (a.shape, a.tolist()) for n, a in arrays.items()
    }


def test_a_file_whose_writer_was_interrupted_is_no_safetensors_file(file):
    writer = TensorFileWriter(file)
    writer.add("norm.bias", INFOS["norm.bias"], [ARRAYS["norm.bias"].tobytes()])
    with pytest.raises(WeightsError, match="no safetensors file"):
        read_tensors(file)
    writer.close()
    assert read_tensors(file) == {"norm.bias": INFOS["norm.bias"]}


def test_an_error_on_the_way_leaves_the_file_unreadable(file):
    with pytest.raises(KeyError):
        write(file, {**ARRAYS, "unknown": ARRAYS["norm.bias"]})
    with pytest.raises(WeightsError, match="no safetensors file"):
        read_tensors(file)


def test_bytes_that_are_not_as_many_as_the_shape_says_are_refused(file):
    with (
        pytest.raises(WeightsError, match=r"norm.bias has 8 bytes, .* has 12"),
        TensorFileWriter(file) as writer,
    ):
        writer.add("norm.bias", INFOS["norm.bias"], [bytes(8)])


def test_a_name_is_written_once(file):
    with TensorFileWriter(file) as writer:
        writer.add("norm.bias", INFOS["norm.bias"], [bytes(12)])
        with pytest.raises(WeightsError, match=r"norm\.bias is given twice"):
            writer.add("norm.bias", INFOS["norm.bias"], [bytes(12)])
