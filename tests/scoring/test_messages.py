import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.errors import WireError
from treepo_async.scoring.messages import LENGTH, pack, unpack

TEXTS = st.text(st.characters(codec=None))


@given(st.dictionaries(TEXTS, TEXTS | st.integers() | st.floats(allow_nan=False)))
def test_a_message_arrives_as_it_was_sent(message):
    packed = pack(message)
    assert LENGTH.unpack(packed[: LENGTH.size]) == (len(packed) - LENGTH.size,)
    assert unpack(packed[LENGTH.size :]) == message


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"null", b"[" * 100_000])
def test_bytes_that_are_no_object_are_refused(body):
    with pytest.raises(WireError, match="scoring message"):
        unpack(body)
