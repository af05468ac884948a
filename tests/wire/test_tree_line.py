import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from tests.wire.test_codec import assert_same
from treepo_async.errors import WireError
from treepo_async.types import Trajectory
from treepo_async.wire.forms import FORMS, encode_trajectories, key_of
from treepo_async.wire.tree_line import decode_line, encode_line, shortest

VOCAB_SIZE = 128


def tree_of(seed, **options):
    return random_tree(np.random.default_rng(seed), vocab_size=VOCAB_SIZE, **options)


def as_text(token_ids):
    return "".join(chr(0x4E00 + token) for token in token_ids)


float32s = st.floats(width=32, max_value=0.0, allow_nan=False, allow_infinity=False)


# ------------------------------------------------------------------ round trip


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_segments=st.integers(1, 40),
    segment_tokens=st.integers(1, 9),
    max_depth=st.integers(1, 6),
    text=st.text(max_size=20),
    inclusion=st.floats(min_value=1e-6, max_value=1.0),
    with_text=st.booleans(),
)
def test_a_tree_comes_back_bit_for_bit(
    seed, num_segments, segment_tokens, max_depth, text, inclusion, with_text
):
    tree = tree_of(
        seed,
        num_segments=num_segments,
        segment_tokens=segment_tokens,
        max_depth=max_depth,
        nan_share=0.3,
    )
    tree = replace(
        tree,
        prompt=replace(tree.prompt, text=text, answer=text[::-1]),
        segments=tuple(replace(s, inclusion=inclusion) for s in tree.segments),
        provenance=replace(tree.provenance, notes=(text,), grow_s=0.1, num_requests=2**40),
    )
    line = encode_line(tree, as_text if with_text else None)
    assert b"\n" not in line
    found = decode_line(line, vocab_size=VOCAB_SIZE)
    assert_same(found, tree)
    assert encode_line(found, as_text if with_text else None) == line


@given(st.lists(float32s, min_size=1, max_size=20))
def test_any_log_prob_comes_back_bit_for_bit(logprobs):
    values = np.array(logprobs, np.float32)
    read = np.array(json.loads(json.dumps(shortest(values))), np.float64).astype(np.float32)
    assert read.tobytes() == values.tobytes()


@given(st.binary(min_size=4, max_size=400).filter(lambda b: len(b) % 4 == 0))
def test_any_finite_float32_comes_back_bit_for_bit(bits):
    values = np.frombuffer(bits, np.float32)
    values = values[np.isfinite(values)]
    assert np.array(shortest(values), np.float64).astype(np.float32).tobytes() == values.tobytes()


def test_a_log_prob_is_written_with_as_few_digits_as_it_needs():
    assert shortest(np.array([-0.1, -1e-5, -0.0, -12.5], np.float32)) == [-0.1, -1e-5, -0.0, -12.5]
    tree = tree_of(1, num_segments=1)
    (segment,) = tree.segments
    logprobs = np.full(len(segment), -0.1, np.float32)
    tree = replace(tree, segments=(replace(segment, behavior_logprobs=logprobs),))
    assert f'"logprobs":[{",".join(["-0.1"] * len(segment))}]'.encode() in encode_line(tree)


def test_a_line_is_what_a_person_can_read():
    tree = tree_of(3, num_segments=3, nan_share=1.0)
    read = json.loads(encode_line(tree, as_text))
    assert read["rewards"] == [None] * len(tree.leaves)
    for found, segment in zip(read["segments"], tree.segments, strict=True):
        assert found["token_ids"] == segment.token_ids.tolist()
        assert found["text"] == as_text(segment.token_ids)
        assert found["policy_version"] == str(segment.policy_version)
        assert found["stop"] == segment.stop
    assert read["provenance"]["lease_id"] == tree.provenance.lease_id
    assert read["sampling"]["temperature"] == tree.sampling.temperature


# ------------------------------------------------------------------ damage

GOOD = json.loads(encode_line(tree_of(5, num_segments=14)))


def edited(path, value):
    """The good line with one field replaced, or removed (`...`)."""
    line = json.loads(json.dumps(GOOD))
    *parents, last = path
    place = line
    for step in parents:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(line).encode()


DAMAGED = {
    "empty": (b"", "tree line"),
    "no JSON": (b"{", "tree line"),
    "no object": (b"[]", "tree line"),
    "bad text": (b'{"format": "\xff"}', "tree line"),
    "deep": (b"[" * 100_000, "tree line"),
    "deep in a field": (b'{"segments":' + b"[" * 100_000, "tree line"),
    "another format": (edited(["format"], 2), "format is 2, this program reads 1"),
    "no format": (edited(["format"], ...), "format"),
    "unknown field": (edited(["extra"], 1), "extra"),
    "unknown field of a segment": (edited(["segments", 0, "extra"], 1), "extra"),
    "unknown field of the sampling": (edited(["sampling", "extra"], 1), "extra"),
    "unknown field of the provenance": (edited(["provenance", "extra"], 1), "extra"),
    "missing field": (edited(["sampling", "width"], ...), "width"),
    "mistyped field": (edited(["segments", 0, "level"], "0"), "level"),
    "no segment": (edited(["segments"], []), "segments is empty"),
    "no prompt": (edited(["prompt_token_ids"], []), "prompt.token_ids is empty"),
    "token outside": (edited(["segments", 0, "token_ids", 0], VOCAB_SIZE), "token_ids_T"),
    "token negative": (edited(["segments", 0, "token_ids", 0], -1), "token_ids_T"),
    "token too large": (edited(["segments", 0, "token_ids", 0], 2**31), "no token id"),
    "prompt token outside": (edited(["prompt_token_ids", 0], VOCAB_SIZE), "prompt_ids_P"),
    "one log-prob more": (edited(["segments", 0, "logprobs"], [-0.1] * 99), r"segments\[0\] has"),
    "log-prob missing": (edited(["segments", 0, "logprobs", 0], None), "logprobs"),
    "log-prob infinite": (edited(["segments", 0, "logprobs", 0], -1e300), "behavior_logprobs"),
    "log-prob above 0": (edited(["segments", 0, "logprobs", 0], 0.5), "behavior_logprobs"),
    "version of no form": (edited(["segments", 0, "policy_version"], "7"), "policy version '7'"),
    "version too large": (edited(["segments", 0, "policy_version"], f"0.{2**31}"), "too large"),
    "unknown stop": (edited(["segments", 0, "stop"], "tired"), "stop"),
    "parent of itself": (edited(["segments", 0, "parent"], 0), r"segments\[0\].parent"),
    "parent too large": (edited(["segments", 0, "parent"], 2**40), "too large"),
    "wrong level": (edited(["segments", 0, "level"], 1), r"segments\[0\].level"),
    "inclusion 0": (edited(["segments", 0, "inclusion"], 0.0), "inclusion"),
    "one reward more": (edited(["rewards"], [0.0] * 99), "accuracies_L|rewards_L"),
    "reward infinite": (edited(["rewards", 0], 1e300), "rewards_L has an infinite value"),
    "cost negative": (edited(["provenance", "num_requests"], -1), "provenance.num_requests"),
    "temperature 0": (edited(["sampling", "temperature"], 0.0), "sampling.temperature"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_line_is_refused_by_the_name_of_what_is_wrong(case):
    line, name = DAMAGED[case]
    with pytest.raises(WireError, match=name):
        decode_line(line, vocab_size=VOCAB_SIZE)


def test_a_flipped_byte_gives_a_valid_tree_or_a_wire_error():
    rng = np.random.default_rng(0)
    good = encode_line(tree_of(5, num_segments=6))
    outcomes = set()
    for _ in range(600):
        damaged = bytearray(good)
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
        try:
            decode_line(bytes(damaged), vocab_size=VOCAB_SIZE).check()
            outcomes.add(True)
        except WireError:
            outcomes.add(False)
    assert outcomes == {True, False}, "both kinds were met"


# ------------------------------------------------------------------ trajectories


def test_trajectories_are_the_paths_of_a_tree_in_the_order_of_its_leaves():
    tree = tree_of(9, num_segments=20, nan_share=0.3)
    lines = [json.loads(line) for line in encode_trajectories(tree, as_text)]
    assert [line["leaf"] for line in lines] == list(range(len(tree.leaves)))
    for leaf, line in enumerate(lines):
        trajectory = Trajectory(tree, leaf)
        path = tree.path(tree.leaves[leaf])
        logprobs = np.concatenate([tree.segments[i].behavior_logprobs for i in path])
        reward = tree.rewards_L[leaf]
        assert line["token_ids"] == trajectory.token_ids.tolist()
        assert np.array(line["logprobs"], np.float32).tolist() == logprobs.tolist()
        assert line["response"] == as_text(trajectory.token_ids)
        assert line["reward"] == (None if np.isnan(reward) else reward)
        assert line["stop"] == trajectory.stop
        assert (line["prompt"], line["num_leaves"]) == (tree.prompt.text, len(tree.leaves))


def test_a_line_says_what_it_is_of_without_being_read_whole():
    tree = tree_of(9)
    (line,) = FORMS["trees"].encode(tree, as_text)
    key = key_of(line)
    assert (key.prompt_id, key.leaf, key.is_last) == (tree.prompt.id, None, True)
    keys = [key_of(line) for line in FORMS["trajectories"].encode(tree, as_text)]
    assert {key.prompt_id for key in keys} == {tree.prompt.id}
    assert [key.is_last for key in keys] == [False] * (len(keys) - 1) + [True]
    with pytest.raises(WireError, match="no line of a tree file"):
        key_of(b'{"question": "what?"}')
