from dataclasses import fields, replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from treepo_async.errors import WireError
from treepo_async.types import PolicyVersion, Provenance, Segment, StopReason, Tree
from treepo_async.wire.codec import ARRAYS, MAGIC, decode_tree, encode_tree

VOCAB_SIZE = 128
NAMES = [name for name, _ in ARRAYS]


def tree_of(seed, **options):
    return random_tree(np.random.default_rng(seed), vocab_size=VOCAB_SIZE, **options)


def assert_same(found: Tree, expected: Tree):
    """Bit for bit: NaN equals NaN, -0.0 differs from 0.0."""
    assert_same_fields(found.prompt, expected.prompt)
    assert len(found.segments) == len(expected.segments)
    for one, other in zip(found.segments, expected.segments, strict=True):
        assert_same_fields(one, other)
    assert found.rewards_L.tobytes() == expected.rewards_L.tobytes()
    assert found.accuracies_L.tobytes() == expected.accuracies_L.tobytes()
    assert (found.sampling, found.provenance) == (expected.sampling, expected.provenance)


def assert_same_fields(found, expected):
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert (one.dtype, one.tobytes()) == (other.dtype, other.tobytes()), field.name
        else:
            assert type(one) is type(other), field.name
            assert one == other, field.name


def edited(frames, name, edit):
    """The frames with one array replaced by `edit(array)`, given as an array or as bytes."""
    place = 2 + NAMES.index(name)
    array = np.frombuffer(frames[place], dtype=ARRAYS[place - 2][1]).copy()
    new = edit(array)
    return [
        *frames[:place],
        new if isinstance(new, bytes) else new.tobytes(),
        *frames[place + 1 :],
    ]


def with_header(frames, **changes):
    header = msgspec.msgpack.decode(frames[1])
    for key, value in changes.items():
        part, _, field = key.partition("__")
        if field:
            header[part][field] = value
        else:
            header[part] = value
    return [frames[0], msgspec.msgpack.encode(header), *frames[2:]]


def first(value):
    def edit(array):
        array[0] = value
        return array

    return edit


def shifted(value):
    """The first number becomes `value` and the second makes up for it."""

    def edit(array):
        array[1] += array[0] - value
        array[0] = value
        return array

    return edit


# ------------------------------------------------------------------ round trip


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_segments=st.integers(1, 40),
    segment_tokens=st.integers(1, 9),
    max_depth=st.integers(1, 6),
    temperature=st.floats(0.01, 3),
    text=st.text(max_size=20),
    notes=st.lists(st.text(max_size=8), max_size=3),
)
def test_a_tree_comes_back_bit_for_bit(
    seed, num_segments, segment_tokens, max_depth, temperature, text, notes
):
    tree = tree_of(
        seed,
        num_segments=num_segments,
        segment_tokens=segment_tokens,
        max_depth=max_depth,
        temperature=temperature,
        nan_share=0.3,
    )
    tree = replace(
        tree,
        prompt=replace(tree.prompt, text=text, answer=text[::-1]),
        provenance=replace(tree.provenance, notes=tuple(notes), grow_s=0.1, num_requests=2**40),
    )
    frames = encode_tree(tree)
    found = decode_tree(frames, vocab_size=VOCAB_SIZE)
    assert_same(found, tree)
    assert encode_tree(found) == frames


@pytest.mark.parametrize("stop", [s for s in StopReason if s is not StopReason.ABORT])
@pytest.mark.parametrize("mixed_context", [True, False])
def test_each_stop_reason_and_flag_comes_back(stop, mixed_context):
    tree = tree_of(1, num_segments=1)
    segment = replace(
        tree.segments[0],
        stop=stop,
        mixed_context=mixed_context,
        policy_version=PolicyVersion(7, 2**31 - 1),
        behavior_logprobs=np.full(len(tree.segments[0]), -0.0, np.float32),
    )
    tree = replace(tree, segments=(segment,))
    assert_same(decode_tree(encode_tree(tree)), tree)


def test_bit_for_bit_sees_the_sign_of_a_zero():
    tree = tree_of(1, num_segments=1)
    changed = replace(tree, rewards_L=np.array([-0.0], np.float32))
    with pytest.raises(AssertionError):
        assert_same(changed, replace(tree, rewards_L=np.array([0.0], np.float32)))


def test_a_field_added_to_the_nouns_must_be_carried():
    """Fails when a noun grows a field that the codec does not know."""
    carried = {name.removesuffix("_S").removesuffix("_T") for name in NAMES}
    known = {
        "parent",
        "level",
        "token_ids",
        "behavior_logprobs",
        "stop",
        "mixed_context",
        "inclusion",
    }
    assert known <= carried
    assert {field.name for field in fields(Segment)} == known | {"policy_version"}
    header = msgspec.msgpack.decode(encode_tree(tree_of(0))[1])
    assert set(header["provenance"]) == {field.name for field in fields(Provenance)}


@given(seed=st.integers(0, 10**6), num_segments=st.integers(1, 60))
@settings(max_examples=30)
def test_a_sampled_token_costs_eight_bytes_and_a_segment_thirty(seed, num_segments):
    tree = tree_of(seed, num_segments=num_segments)
    frames = encode_tree(tree)
    total = sum(len(frame) for frame in frames)
    arrays = (
        8 * tree.num_tokens
        + 30 * len(tree.segments)
        + 8 * len(tree.leaves)
        + 4 * len(tree.prompt.token_ids)
    )
    assert total == len(MAGIC) + len(frames[1]) + arrays
    words = tree.prompt.id + tree.prompt.text + tree.prompt.answer
    words += tree.provenance.lease_id + tree.provenance.actor
    assert len(frames[1]) - len(words) < 400, "the header does not grow with the tree"


# ------------------------------------------------------------------ damage

GOOD = encode_tree(tree_of(5, num_segments=14))
DEEP = 100_000

DAMAGED = {
    "no frame": ([], "15 frames"),
    "missing frame": (GOOD[:-1], "15 frames"),
    "one frame more": ([*GOOD, b""], "15 frames"),
    "wrong magic": ([b"TPO1", *GOOD[1:]], "TPO2"),
    "empty magic": ([b"", *GOOD[1:]], "TPO2"),
    "prompt in half bytes": (edited(GOOD, "prompt_ids_P", lambda a: a.tobytes()[:-1]), "prompt_ids_P"),
    "odd bytes": (edited(GOOD, "token_ids_T", lambda a: a.tobytes() + b"x"), "token_ids_T"),
    "empty prompt": (edited(GOOD, "prompt_ids_P", lambda a: a[:0]), "prompt.token_ids"),
    "stop code too high": (edited(GOOD, "stop_S", first(len(StopReason) + 1)), "stop_S"),
    "stop code negative": (edited(GOOD, "stop_S", first(-1)), "stop_S"),
    "flag out of range": (edited(GOOD, "mixed_context_S", first(2)), "mixed_context_S"),
    "inclusion of nothing": (edited(GOOD, "inclusion_S", first(0)), r"segments\[0\].inclusion"),
    "inclusion above one": (edited(GOOD, "inclusion_S", first(2)), r"segments\[0\].inclusion"),
    "inclusion whose inverse is infinite": (
        edited(GOOD, "inclusion_S", first(5e-324)),
        r"segments\[0\].inclusion",
    ),
    "inclusion that is no number": (
        edited(GOOD, "inclusion_S", first(np.nan)),
        r"segments\[0\].inclusion",
    ),
    "negative step": (edited(GOOD, "step_S", first(-1)), "step_S"),
    "negative lineage": (edited(GOOD, "lineage_S", first(-1)), "lineage_S"),
    "parent of itself": (edited(GOOD, "parent_S", first(0)), r"segments\[0\].parent"),
    "parent below the root": (edited(GOOD, "parent_S", first(-2)), r"segments\[0\].parent"),
    "parent far away": (edited(GOOD, "parent_S", first(2**31 - 1)), r"segments\[0\].parent"),
    "wrong level": (edited(GOOD, "level_S", first(1)), r"segments\[0\].level"),
    "negative level": (edited(GOOD, "level_S", first(-1)), r"segments\[0\].level"),
    "length of zero": (edited(GOOD, "length_S", first(0)), "length_S"),
    "length of zero, made up for": (edited(GOOD, "length_S", shifted(0)), "length_S"),
    "length negative, made up for": (edited(GOOD, "length_S", shifted(-3)), "length_S"),
    "length negative": (edited(GOOD, "length_S", first(-5)), "length_S"),
    "length that overflows": (edited(GOOD, "length_S", first(2**31 - 1)), "length_S"),
    "log-prob NaN": (edited(GOOD, "behavior_logprobs_T", first(np.nan)), "behavior_logprobs"),
    "log-prob infinite": (edited(GOOD, "behavior_logprobs_T", first(-np.inf)), "behavior_logprobs"),
    "log-prob above 0": (edited(GOOD, "behavior_logprobs_T", first(0.5)), "behavior_logprobs"),
    "token outside": (edited(GOOD, "token_ids_T", first(VOCAB_SIZE)), "token_ids_T"),
    "token negative": (edited(GOOD, "token_ids_T", first(-1)), "token_ids_T"),
    "prompt token outside": (edited(GOOD, "prompt_ids_P", first(VOCAB_SIZE)), "prompt_ids_P"),
    "reward infinite": (edited(GOOD, "rewards_L", first(np.inf)), "rewards_L"),
    "accuracy infinite": (edited(GOOD, "accuracies_L", first(-np.inf)), "accuracies_L"),
    "no leaf": (
        edited(edited(GOOD, "rewards_L", lambda a: a[:0]), "accuracies_L", lambda a: a[:0]),
        "rewards_L",
    ),
    "header field unknown": (with_header(GOOD, extra=1), "header.*extra"),
    "header field unknown inside": (with_header(GOOD, sampling__extra=1), "header.*extra"),
    "header field mistyped": (with_header(GOOD, prompt_id=7), r"header.*prompt_id"),
    "header field mistyped inside": (with_header(GOOD, sampling__width="8"), r"header.*width"),
    "header truncated": ([MAGIC, GOOD[1][:-3], *GOOD[2:]], "header"),
    "header empty": ([MAGIC, b"", *GOOD[2:]], "header"),
    "header with more behind it": ([MAGIC, GOOD[1] + b"\x00", *GOOD[2:]], "header"),
    "header of deep lists": ([MAGIC, b"\x91" * DEEP, *GOOD[2:]], "header"),
    "header of deep maps": ([MAGIC, b"\x81\xa1a" * DEEP, *GOOD[2:]], "header"),
    "header deep in a field": (
        [MAGIC, GOOD[1].replace(b"notes\x90", b"notes" + b"\x91" * DEEP), *GOOD[2:]],
        "header",
    ),
    "header of bad text": ([MAGIC, GOOD[1].replace(b"a problem", b"a \xff\xfeoblem"), *GOOD[2:]], "header"),
    "segment length 0": (with_header(GOOD, sampling__segment_tokens=0), "sampling.segment_tokens"),
    "temperature 0": (with_header(GOOD, sampling__temperature=0.0), "sampling.temperature"),
    "temperature NaN": (with_header(GOOD, sampling__temperature=np.nan), "sampling.temperature"),
    "cost NaN": (with_header(GOOD, provenance__overhead_s=np.nan), "provenance.overhead_s"),
    "cost infinite": (with_header(GOOD, provenance__grow_s=np.inf), "provenance.grow_s"),
    "cost negative": (with_header(GOOD, provenance__num_requests=-1), "provenance.num_requests"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tree_is_refused_by_the_name_of_what_is_wrong(case):
    frames, name = DAMAGED[case]
    assert frames != GOOD, "the case damages something"
    with pytest.raises(WireError, match=name):
        decode_tree(frames, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("change", [-1, +1], ids=["shorter", "longer"])
def test_an_array_of_another_length_is_refused_by_name(name, change):
    def edit(array):
        return array[:-1] if change < 0 else np.append(array, array[-1:])

    partners = {"token_ids_T": "length_S|token_ids_T", "parent_S": "parent_S", "rewards_L": "rewards_L"}  # fmt: skip
    with pytest.raises(WireError, match=partners.get(name, name)):
        decode_tree(edited(GOOD, name, edit))


def test_without_a_vocabulary_any_token_id_from_zero_passes():
    frames = edited(GOOD, "token_ids_T", first(2**31 - 1))
    assert decode_tree(frames).segments[0].token_ids[0] == 2**31 - 1


# ------------------------------------------------------------------ fuzz


def decodes_or_refuses(frames):
    """Whether the frames are a tree; anything but a valid tree or a WireError fails the test."""
    try:
        tree = decode_tree(frames, vocab_size=VOCAB_SIZE)
    except WireError:
        return False
    tree.check()
    return True


def test_a_flipped_byte_gives_a_valid_tree_or_a_wire_error():
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(4000):
        frames = list(GOOD)
        place = int(rng.integers(len(frames)))
        damaged = bytearray(frames[place])
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
        frames[place] = bytes(damaged)
        outcomes.add(decodes_or_refuses(frames))
    assert outcomes == {True, False}, "both kinds were met"


def test_random_bytes_give_a_wire_error():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        frames = list(GOOD)
        for place in rng.choice(np.arange(1, len(frames)), size=int(rng.integers(1, 5))):
            frames[place] = rng.bytes(int(rng.integers(0, 64)))
        decodes_or_refuses(frames)


@given(header=st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
@settings(max_examples=150)
def test_any_msgpack_in_a_header_field_gives_a_valid_tree_or_a_wire_error(header):
    for field in ("prompt_id", "sampling", "sampling__segment_tokens", "provenance__notes"):
        decodes_or_refuses(with_header(GOOD, **{field: header}))


@given(frames=st.lists(st.binary(max_size=40), max_size=16))
def test_any_list_of_frames_gives_a_wire_error(frames):
    assert not decodes_or_refuses(frames)
