import dataclasses

import pytest

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.manifest import Manifest, Probe, TensorInfo
from treepo_async.weights.parcel import Parcel, StagePart

MODEL = {"a": TensorInfo("F32", (2, 3)), "b": TensorInfo("F32", (4,)), "c": TensorInfo("F32", ())}
PARCEL = Parcel(
    Manifest(
        version="1.7",
        tensors=MODEL,
        hashes={},
        probe=Probe([[1, 2]], [[-0.5]]),
        evaluate=True,
        published_at=12.5,
    ),
    ((("a", "b"),), (("c",),)),
)


def test_a_parcel_comes_back_equal_and_names_its_version():
    assert Parcel.parse(PARCEL.to_bytes()) == PARCEL
    assert PARCEL.version == PolicyVersion(1, 7)


def test_what_a_stage_has_comes_back_equal():
    part = StagePart(MODEL, (("a", "b"), ("c",)))
    assert StagePart.of_words(part.to_words()) == part


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'["{}", []]', b"\xff", b'["[]", [[["a"]]]]'])
def test_what_is_no_parcel_is_refused(data):
    with pytest.raises(WeightsError, match="an offer of weights cannot be read"):
        Parcel.parse(data)


def test_a_parcel_of_the_model_passes():
    PARCEL.check(MODEL)


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        (((("a",),), (("c",),)), "b is in 0 buckets"),
        (((("a", "b"),), (("c", "a"),)), "a is in 2 buckets"),
        (((("a", "b"),), (("c", "d"),)), "d is in 1 buckets"),
    ],
)
def test_each_tensor_must_be_in_one_bucket(stages, named):
    with pytest.raises(WeightsError, match=named):
        dataclasses.replace(PARCEL, stages=stages).check(MODEL)


def test_a_parcel_of_another_model_is_refused_by_the_name_of_a_tensor():
    with pytest.raises(WeightsError, match=r"offer of 1\.7 has b as .*\(4,\).*\(5,\)"):
        PARCEL.check(MODEL | {"b": TensorInfo("F32", (5,))})
