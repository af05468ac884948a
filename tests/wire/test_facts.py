from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import random_tree
from tests.wire.test_codec import DAMAGED, GOOD, NAMES, VOCAB_SIZE, edited, first, with_header
from treepo_async.errors import WireError
from treepo_async.tree.advantage import has_spread
from treepo_async.tree.path_weights import leaf_weights
from treepo_async.types import NO_LINEAGE, PolicyVersion, StopReason, Tree
from treepo_async.wire.codec import decode_tree, digest_of, encode_tree
from treepo_async.wire.columns import ARRAYS
from treepo_async.wire.facts import TreeFacts, facts_of


def by_step(version: PolicyVersion):
    return version.step, version.lineage


def expected(tree: Tree) -> TreeFacts:
    """The definition of the facts, on the nouns."""
    known = tree.accuracies_L[np.isfinite(tree.accuracies_L)]
    weights_L = leaf_weights(tree, "unbiased")[tree.is_whole_L]
    return TreeFacts(
        prompt_id=tree.prompt.id,
        provenance=tree.provenance,
        versions=tuple(sorted({s.policy_version for s in tree.segments})),
        oldest=min((s.policy_version for s in tree.whole_segments), key=by_step),
        num_leaves=int(tree.is_whole_L.sum()),
        num_scored=len(known),
        accuracy_sum=float(known.sum()),
        has_spread=has_spread(tree),
        is_scored=bool(np.isfinite(tree.rewards_L).any()),
        num_tokens=tree.num_tokens,
        delivered_tokens=tree.num_delivered_tokens,
        weight_sum=float(weights_L.sum()),
        weighted_tokens=float(weights_L @ tree.num_tokens_L[tree.is_whole_L]),
    )


def assert_facts(found: TreeFacts, wanted: TreeFacts):
    sums = ("weight_sum", "weighted_tokens")
    for name in sums:
        np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9)
    assert replace(found, **{name: getattr(wanted, name) for name in sums}) == wanted


def attempt(read, frames):
    """What it gives, or None where it refuses."""
    try:
        return read(frames, vocab_size=VOCAB_SIZE)
    except WireError:
        return None


def assert_agree(frames) -> bool:
    """Both accept, with the same facts, or both refuse. Gives whether they accept."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        facts, tree = attempt(facts_of, frames), attempt(decode_tree, frames)
        assert (facts is None) == (tree is None)
        if tree is not None:
            assert_facts(facts, expected(tree))
    return tree is not None


def spoiled(tree: Tree, rng: np.random.Generator) -> Tree:
    """The tree with some leaves pruned and unscored, and paths let go on by chance."""
    leaves = set(tree.leaves)
    segments = tuple(
        replace(
            segment,
            inclusion=float(rng.choice([1.0, 0.5, rng.uniform(0.1, 1.0)])),
            stop=StopReason.PRUNED if i in leaves and rng.random() < 0.3 else segment.stop,
        )
        for i, segment in enumerate(tree.segments)
    )
    return replace(tree, segments=segments)


TREES = st.builds(
    lambda seed, num_segments, segment_tokens, max_depth, nan_share: spoiled(
        random_tree(
            np.random.default_rng(seed),
            num_segments=num_segments,
            segment_tokens=segment_tokens,
            max_depth=max_depth,
            nan_share=nan_share,
            vocab_size=VOCAB_SIZE,
        ),
        np.random.default_rng(seed),
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3, 1.0]),
)


@settings(max_examples=150)
@given(tree=TREES)
def test_the_facts_of_frames_are_those_of_the_tree_in_them(tree):
    assert_facts(facts_of(encode_tree(tree), vocab_size=VOCAB_SIZE), expected(tree))


def test_versions_are_told_apart_by_lineage_and_step():
    versions = [PolicyVersion(0, 2**31 - 1), PolicyVersion(1, 0), PolicyVersion(NO_LINEAGE, 3)]
    tree = random_tree(np.random.default_rng(3), num_segments=30, versions=versions)
    facts = facts_of(encode_tree(tree))
    assert facts.versions == tuple(versions)
    assert (facts.lease_id, facts.actor) == (tree.provenance.lease_id, "actor-0")


def test_a_tree_of_pruned_paths_alone_is_as_old_as_its_oldest_segment():
    tree = random_tree(np.random.default_rng(4), num_segments=20)
    pruned = tuple(replace(s, stop=s.stop and StopReason.PRUNED) for s in tree.segments)
    facts = facts_of(encode_tree(replace(tree, segments=pruned)))
    assert facts.num_leaves == facts.delivered_tokens == facts.weight_sum == 0
    assert facts.oldest == min((s.policy_version for s in tree.segments), key=by_step)


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_tree_is_refused_by_the_name_of_what_is_wrong(case):
    frames, name = DAMAGED[case]
    with pytest.raises(WireError, match=name):
        facts_of(frames, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("field", ["segment_tokens", "max_depth", "width", "branching_factor"])
def test_a_setting_of_any_size_is_judged_alike(field):
    sizes = [*range(12), 2**31 - 1, 2**31, 2**63]
    outcomes = {assert_agree(with_header(GOOD, **{f"sampling__{field}": size})) for size in sizes}
    assert outcomes == {True, False}, "some are too small"


@pytest.mark.parametrize("grid", range(1, 9))
def test_levels_are_judged_alike_on_any_grid(grid):
    for seed in range(30):
        frames = encode_tree(random_tree(np.random.default_rng(seed), segment_tokens=4))
        assert_agree(with_header(frames, sampling__segment_tokens=grid))


@pytest.mark.parametrize("length", range(2, 7))
def test_a_segment_lies_within_one_level(length):
    """8 tokens on a grid of 4, cut in two."""
    chain = random_tree(np.random.default_rng(0), num_segments=1, segment_tokens=8)
    frames = with_header(encode_tree(chain), sampling__segment_tokens=4, sampling__max_depth=2)
    columns = {
        "token_ids_T": [1] * 8,
        "behavior_logprobs_T": [0] * 8,
        "parent_S": [-1, 0],
        "level_S": [0, 1],
        "length_S": [length, 8 - length],
        "lineage_S": [0, 0],
        "step_S": [0, 0],
        "stop_S": [0, 1],
        "mixed_context_S": [0, 0],
        "inclusion_S": [1, 1],
    }
    assert assert_agree(with_columns(frames, columns)) == (length == 4)


@pytest.mark.parametrize("logprob", [1e-4, np.nextafter(np.float32(1e-4), np.float32(1)), 5e-4])
def test_the_slack_of_a_log_prob_is_judged_alike(logprob):
    assert assert_agree(edited(GOOD, "behavior_logprobs_T", first(logprob))) == (logprob == 1e-4)


def with_columns(frames, columns):
    """The frames with these arrays in the place of theirs."""
    for name, values in columns.items():
        dtype = ARRAYS[NAMES.index(name)][1]
        frames = edited(frames, name, lambda _, v=values, d=dtype: np.asarray(v).astype(d))
    return frames


def mutated(frames, draw):
    """The frames with one array changed in a way that keeps it an array of the type."""
    name = draw(st.sampled_from(NAMES))
    _, dtype = ARRAYS[NAMES.index(name)]
    array = np.frombuffer(frames[2 + NAMES.index(name)], dtype).copy()
    place = draw(st.integers(0, max(0, len(array) - 1)))
    low, high = {"f": (-2, 2), "i": (-2, 12)}[dtype.kind]
    value = draw(st.integers(low, high))
    change = draw(st.sampled_from(["set", "swap", "drop", "double", "extreme"]))
    if change == "extreme":
        value = draw(st.sampled_from([np.inf, -np.inf, np.nan, 1e-4, 0.5] if dtype.kind == "f" else [-128, 127]))  # fmt: skip

    def edit(a):
        if len(a) == 0 or change == "drop":
            return np.delete(a, place) if len(a) else a
        if change == "double":
            return np.insert(a, place, a[place])
        a[place] = array[draw(st.integers(0, len(a) - 1))] if change == "swap" else value
        return a

    return edited(frames, name, edit)


@settings(max_examples=400)
@given(data=st.data(), tree=TREES, number=st.integers(1, 3))
def test_facts_are_given_exactly_where_the_tree_decodes(data, tree, number):
    frames = encode_tree(tree)
    for _ in range(number):
        frames = mutated(frames, data.draw)
    assert_agree(frames)


def test_a_flipped_byte_is_judged_alike():
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(3000):
        frames = list(GOOD)
        place = int(rng.integers(len(frames)))
        damaged = bytearray(frames[place])
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
        frames[place] = bytes(damaged)
        outcomes.add(assert_agree(frames))
    assert outcomes == {True, False}, "both kinds were met"


def test_a_path_of_many_segments_takes_few_rounds():
    """A chain as deep as it is long: the work grows with its length alone."""
    number = 200_000
    frames = encode_tree(random_tree(np.random.default_rng(0), num_segments=1, segment_tokens=1))
    columns = {
        "token_ids_T": np.ones(number),
        "behavior_logprobs_T": np.zeros(number),
        "parent_S": np.arange(number) - 1,
        "level_S": np.arange(number),
        "length_S": np.ones(number),
        "lineage_S": np.zeros(number),
        "step_S": np.zeros(number),
        "stop_S": np.arange(number) == number - 1,
        "mixed_context_S": np.zeros(number),
        "inclusion_S": np.ones(number),
    }
    frames = with_columns(frames, columns)
    facts = facts_of(with_header(frames, sampling__max_depth=number))
    assert facts.delivered_tokens == facts.weighted_tokens == number


# ------------------------------------------------------------------ digest


def test_a_digest_sees_every_bit_and_where_frames_end():
    digest = digest_of(GOOD)
    assert 0 <= digest < 2**64
    assert digest == digest_of([memoryview(frame) for frame in GOOD])
    flipped = bytearray(GOOD[3])
    flipped[-1] ^= 1
    others = [
        [*GOOD[:3], bytes(flipped), *GOOD[4:]],
        [*GOOD[:3], GOOD[3][:-1], GOOD[3][-1:] + GOOD[4], *GOOD[5:]],
        [*GOOD, b""],
        GOOD[:-1],
        [],
    ]
    assert len({digest, *map(digest_of, others)}) == 1 + len(others)


def test_a_digest_is_the_same_in_every_process():
    assert digest_of([b"TPO2", b"abc", b""]) == DIGEST


DIGEST = 13700200526340153826


@pytest.mark.parametrize(("chance", "is_good"), [(1e-140, True), (1e-160, False)])
def test_a_path_of_small_chances_is_taken_while_its_weight_is_finite(chance, is_good):
    parents = first_with_a_parent(GOOD)

    def edit(inclusion_S):
        inclusion_S[list(parents)] = chance
        return inclusion_S

    frames = edited(edited(GOOD, "inclusion_S", np.ones_like), "inclusion_S", edit)
    assert assert_agree(frames) is is_good
    if is_good:
        assert np.isfinite(facts_of(frames).weight_sum)


def first_with_a_parent(frames):
    """A segment, and the one before it on its path."""
    parent_S = [segment.parent for segment in decode_tree(frames).segments]
    return next((parent, i) for i, parent in enumerate(parent_S) if parent >= 0)
