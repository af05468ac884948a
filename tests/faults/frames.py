"""Messages that no honest peer sends: made by damaging real ones, and by hand where a decoder is most easily led astray."""

import random
import typing
from collections.abc import Iterator, Sequence

import msgspec

from treepo_async.wire.codec import digest_of
from treepo_async.wire.messages import AnyMessage, Message, PutTree, WeightsGroup, encode

Frames = list[bytes]
KINDS: tuple[type[Message], ...] = typing.get_args(AnyMessage)

LEASE_ID = "000000001"
HUGE = (-(2**63), -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
LYING = (
    b"\xdd\xff\xff\xff\xff",  # a list of 4 billion
    b"\xdf\xff\xff\xff\xff",  # a map of as many
    b"\xdb\xff\xff\xff\xff",  # a text of as many bytes
    b"\xc6\xff\xff\xff\xff",  # bytes likewise
    b"\xc9\xff\xff\xff\xff\x01",  # an extension likewise
    b"\x82\xa4type\xa4Beat\xa6leases\xdd\xff\xff\xff\xff",
    b"\x82\xa4type\xa5Hello\xa4name\xdb\xff\xff\xff\xff",
)
DEEP = (
    b"\x91" * 200_000,
    b"\x81\xa1a" * 100_000,
    b"\x82\xa4type\xa4Beat\xa6leases" + b"\x91" * 50_000,
)


def examples() -> list[Message]:
    """A message of every type, with values in every field."""
    values: dict[typing.Any, typing.Any] = {
        bool: True, int: 3, float: 0.5, str: LEASE_ID, list[str]: [LEASE_ID], list[int]: [1, 2],
        dict[str, int]: {"a": 1}, dict[int, str]: {3: "a"},
        list[WeightsGroup]: [WeightsGroup(name="a", address="127.0.0.1", port=1)],
    }  # fmt: skip
    return [
        kind(**{name: values[hint] for name, hint in typing.get_type_hints(kind).items()})
        for kind in KINDS
    ]


def invalid(seed: int, tree: Sequence[bytes]) -> Iterator[Frames]:
    """Frames without end, most of which are no message; `tree` are the frames of a good tree."""
    rng = random.Random(seed)
    good = [encode(message) for message in examples()]
    put = next(m for m in examples() if isinstance(m, PutTree))
    makers = (
        _noise,
        _huge_claim,
        _damaged,
        _lying,
        _field_of_another_kind,
        _huge_number,
        _bad_tree,
        _bad_count,
    )
    deep = 0
    while True:
        deep += 1
        if deep % 500 == 0:
            yield [rng.choice(DEEP)]
            continue
        maker = rng.choice(makers)
        yield maker(rng, rng.choice(good), [encode(put), *tree])


def _noise(rng: random.Random, _good: bytes, _put: Frames) -> Frames:
    return [rng.randbytes(rng.randrange(64)) for _ in range(rng.choice((1, 1, 1, 2, 16)))]


def _damaged(rng: random.Random, good: bytes, _put: Frames) -> Frames:
    return [_hurt(rng, good)]


def _lying(rng: random.Random, good: bytes, _put: Frames) -> Frames:
    place = rng.randrange(len(good) + 1)
    return [rng.choice((rng.choice(LYING), good[:place] + rng.choice(LYING)))]


def _field_of_another_kind(rng: random.Random, good: bytes, _put: Frames) -> Frames:
    raw = msgspec.msgpack.decode(good)
    raw[rng.choice(list(raw))] = rng.choice((None, [], {}, -1, 1e308, "x" * 5000, b"\xff", [[1]]))
    return [msgspec.msgpack.encode(raw)]


def _huge_number(rng: random.Random, good: bytes, _put: Frames) -> Frames:
    raw = msgspec.msgpack.decode(good)
    numbers = [name for name, value in raw.items() if type(value) is int]
    for name in rng.sample(numbers, rng.randint(1, len(numbers))):
        raw[name] = rng.choice(HUGE)
    return [msgspec.msgpack.encode(raw)]


def _huge_claim(rng: random.Random, _good: bytes, put: Frames) -> Frames:
    """A good tree with its own digest, of an attempt that cannot be."""
    raw = msgspec.msgpack.decode(put[0])
    raw["digest"] = digest_of(put[1:])
    raw["attempt"] = rng.choice((*HUGE, 0, 2**31 - 1))
    return [msgspec.msgpack.encode(raw), *put[1:]]


def _bad_tree(rng: random.Random, _good: bytes, put: Frames) -> Frames:
    frames = list(put)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(1, len(frames))
        frames[place] = _hurt(rng, frames[place])
    return _signed(rng, frames)


def _bad_count(rng: random.Random, _good: bytes, put: Frames) -> Frames:
    kind = rng.randrange(4)
    if kind == 0:
        return _signed(rng, put[: rng.randrange(1, len(put))])
    if kind == 1:
        return _signed(rng, [*put, *[b""] * rng.choice((1, 100))])
    if kind == 2:
        return rng.sample(put, len(put))
    return _signed(rng, [put[0], *[rng.choice(put)] * rng.randrange(40)])


def _signed(rng: random.Random, put: Frames) -> Frames:
    """With the digest that belongs to the frames, mostly: else nothing else of them is looked at."""
    if rng.random() < 0.1:
        return put
    message = PutTree(request=3, lease_id=LEASE_ID, attempt=1, digest=digest_of(put[1:]))
    return [encode(message), *put[1:]]


def _hurt(rng: random.Random, frame: bytes) -> bytes:
    """A frame with a byte changed, cut off, put in, or written twice."""
    if not frame:
        return rng.randbytes(rng.randrange(1, 9))
    place = rng.randrange(len(frame))
    kind = rng.randrange(4)
    if kind == 0:
        return frame[:place] + bytes([frame[place] ^ rng.randint(1, 255)]) + frame[place + 1 :]
    if kind == 1:
        return frame[:place]
    if kind == 2:
        return frame[:place] + rng.randbytes(rng.randrange(1, 9)) + frame[place:]
    return frame + frame[place:]
