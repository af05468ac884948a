import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.errors import WireError
from treepo_async.wire import messages
from treepo_async.wire.messages import (
    MAX_MESSAGE_BYTES,
    Ack,
    AnyMessage,
    AskLease,
    Hello,
    Message,
    Published,
    WeightsGroup,
    decode,
    encode,
    request_of,
)

TYPES = typing.get_args(AnyMessage)


def named(kind):
    return kind.__name__


def example(kind):
    """A message with every field away from its default."""
    values = {bool: True, int: 7, float: 2.5, str: "seven", list[str]: ["a", "b"], list[int]: [1, 2], dict[str, int]: {"a": 1}, dict[int, str]: {3: "a"}, list[WeightsGroup]: [WeightsGroup("a", "b", 7)]}  # fmt: skip
    return kind(**{name: values[hint] for name, hint in typing.get_type_hints(kind).items()})


@pytest.mark.parametrize("kind", TYPES, ids=named)
def test_every_message_comes_back_equal(kind):
    message = example(kind)
    found = decode(encode(message))
    assert type(found) is kind
    assert found == message


@pytest.mark.parametrize("kind", TYPES, ids=named)
def test_an_unknown_field_is_refused_by_name(kind):
    raw = {**msgspec.msgpack.decode(encode(example(kind))), "surprise": 1}
    with pytest.raises(WireError, match="surprise"):
        decode(msgspec.msgpack.encode(raw))


@pytest.mark.parametrize("kind", TYPES, ids=named)
def test_a_field_of_another_type_is_refused_by_name(kind):
    for field in typing.get_type_hints(kind):
        raw = {**msgspec.msgpack.decode(encode(example(kind))), field: {"no": None}}
        with pytest.raises(WireError, match=field):
            decode(msgspec.msgpack.encode(raw))


def test_every_message_class_is_in_the_union():
    """A message outside of the union could be sent but never be read."""
    defined = {
        kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, Message)
    }  # fmt: skip
    assert defined - {Message} == set(TYPES)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        encode(Ack(note="ok"))[:-1],
        encode(Ack()) + b"\x00",
        msgspec.msgpack.encode({"type": "Launch", "request": 1}),
        msgspec.msgpack.encode({"request": 1}),
        msgspec.msgpack.encode({"type": "Message", "request": 1}),
        msgspec.msgpack.encode({"type": "Hello", "name": "actor-0"}),
        msgspec.msgpack.encode(["Ack", 1]),
        b"\x91" * 100_000,
        b"\x81\xa4type" * 100_000,
    ],
    ids=["empty", "no msgpack", "cut", "more behind", "unknown tag", "no tag", "base class",
         "missing fields", "a list", "deep lists", "deep maps"],
)  # fmt: skip
def test_what_is_no_message_is_refused(frame):
    with pytest.raises(WireError):
        decode(frame)


@given(st.binary(max_size=60))
def test_any_bytes_give_a_message_or_a_wire_error(frame):
    try:
        found = decode(frame)
    except WireError:
        return
    assert isinstance(found, Message)


@given(st.data())
def test_a_flipped_byte_gives_a_message_or_a_wire_error(data):
    good = encode(Hello(request=3, name="actor-0", run_id="abc"))
    place = data.draw(st.integers(0, len(good) - 1))
    damaged = bytearray(good)
    damaged[place] ^= data.draw(st.integers(1, 255))
    try:
        found = decode(bytes(damaged))
    except WireError:
        return
    assert isinstance(found, Message)


def test_a_frame_above_the_limit_is_not_even_looked_at():
    good = encode(Ack(note="x" * (MAX_MESSAGE_BYTES - 100)))
    assert len(decode(good).note) == MAX_MESSAGE_BYTES - 100
    with pytest.raises(WireError, match="at most 1048576 are read"):
        decode(encode(Ack(note="x" * MAX_MESSAGE_BYTES)))


def test_a_whole_number_serves_as_seconds():
    raw = msgspec.msgpack.encode({"type": "AskLease", "request": 0, "wait_s": 5})
    assert decode(raw) == AskLease(wait_s=5.0)


@pytest.mark.parametrize("number", [-1, 2**31, 2**63])
def test_a_number_that_is_kept_is_refused_where_no_file_could_hold_it(number):
    for raw in (
        {"type": "PutTree", "lease_id": "000000001", "attempt": number},
        {"type": "AskBatch", "step": 0, "lineage": number, "wait_s": 1.0},
        {"type": "Published", "step": 0, "lineage": 0, "consumed_step": number - (number < 0)},
    ):
        with pytest.raises(WireError, match=r"lineage|attempt|consumed_step"):
            decode(msgspec.msgpack.encode(raw))


def test_the_first_weights_of_a_run_consumed_no_step():
    message = Published(step=0, lineage=0, consumed_step=-1)
    assert decode(encode(message)) == message


def test_a_name_is_no_longer_than_a_hundred_characters():
    assert decode(encode(Hello(name="a" * 100, run_id="r"))).name == "a" * 100
    with pytest.raises(WireError, match="name"):
        decode(encode(Hello(name="a" * 101, run_id="r")))


def test_an_answer_may_be_larger_than_a_request():
    answer = Ack(note="x" * MAX_MESSAGE_BYTES)
    assert decode(encode(answer), max_bytes=None) == answer


def test_the_number_of_a_request_is_read_where_the_rest_cannot_be():
    bad = {"type": "PutTree", "request": 9, "attempt": -1, "surprise": [[1]]}
    assert request_of(msgspec.msgpack.encode(bad)) == 9
    huge = msgspec.msgpack.encode({"request": 9, "note": "x" * MAX_MESSAGE_BYTES})
    for frame in (b"", b"\xc1", b"\x91" * 100_000, encode(Ack(request=9))[:-1], huge):
        assert request_of(frame) == 0
