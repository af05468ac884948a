import contextlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.errors import DataError
from treepo_async.replay.record import (
    HEADER_BYTES,
    MAGIC,
    Kind,
    encode,
    header_of,
    length_of,
    parts_of,
)

PARTS = st.lists(st.binary(max_size=40), max_size=5)


def written(kind, parts, segment=1, offset=0):
    return b"".join(encode(kind, parts, segment, offset))


def read(data, segment=1, offset=0):
    header = header_of(data, segment, offset)
    return None if header is None else (header.kind, parts_of(header, data[HEADER_BYTES:]))


@given(
    kind=st.sampled_from(Kind),
    parts=PARTS,
    segment=st.integers(1, 10**6),
    offset=st.integers(0, 2**39),
)
def test_a_record_is_read_as_it_was_written_at_its_place(kind, parts, segment, offset):
    data = written(kind, parts, segment, offset)
    assert len(data) == length_of(parts) == header_of(data, segment, offset).length
    assert read(data, segment, offset) == (kind, parts)


@given(parts=PARTS, seed=st.integers(0, 2**32))
def test_no_changed_bit_goes_unnoticed(parts, seed):
    data = bytearray(written(Kind.TREE, parts))
    chance = random.Random(seed)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    with contextlib.suppress(DataError):
        assert read(bytes(data)) is None


@given(parts=PARTS, cut=st.floats(0, 1, exclude_max=True))
def test_a_part_of_a_record_is_none(parts, cut):
    data = written(Kind.NOTE, parts)
    with contextlib.suppress(DataError):
        assert read(data[: int(cut * len(data))]) is None


@pytest.mark.parametrize(("segment", "offset"), [(1, 8), (2, 0)])
def test_a_record_that_was_copied_elsewhere_is_none(segment, offset):
    assert header_of(written(Kind.TREE, [b"x"]), segment, offset) is None


def test_frames_that_are_views_are_written_without_a_copy():
    frame = memoryview(bytes(1000))
    assert any(buffer is frame for buffer in encode(Kind.TREE, [b"", frame], 1, 0))


def test_a_header_of_an_unknown_kind_is_none():
    assert header_of(written(9, [b"x"]), 1, 0) is None
    assert header_of(MAGIC, 1, 0) is None
