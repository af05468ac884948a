import random
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tree.scripted import ANSWERED, ScriptedEngine, grow, tree_of
from treepo_async.tree.prune import mean_logprob
from treepo_async.tree.rules import GrowthRules, PruneRules
from treepo_async.types import ROOT

FALLBACKS = ("random", "low_confidence", "from_start", "none")


@st.composite
def rules_strategy(draw):
    width = draw(st.integers(1, 32))
    first_fork_max = draw(st.integers(1, width))
    segment_tokens, max_depth = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    return GrowthRules(
        segment_tokens=segment_tokens,
        max_depth=max_depth,
        width=width,
        branching_factor=draw(st.integers(1, 4)),
        first_fork_min=draw(st.integers(1, first_fork_max)),
        first_fork_max=first_fork_max,
        fallback=draw(st.sampled_from(FALLBACKS)),
        max_response_tokens=draw(
            st.none() | st.integers(1, segment_tokens * max_depth + segment_tokens)
        ),
    )


@st.composite
def grown(draw):
    rules, seed = draw(rules_strategy()), draw(st.integers(0, 10_000))
    engine = ScriptedEngine(
        random.Random(seed),
        stop_rate=draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.8])),
        update_rate=draw(st.sampled_from([0.0, 0.2])),
    )
    return *grow(rules, engine, seed), rules


examples = settings(deadline=None, max_examples=150)


@st.composite
def grown_by_any_rule(draw):
    """Forks dealt out by any split, paths pruned by any rule, and weights that change meanwhile or not."""
    rules, seed = draw(rules_strategy()), draw(st.integers(0, 10_000))
    prune = PruneRules(
        min_logprob=draw(st.sampled_from([None, None, -1.0])),
        value=draw(st.sampled_from([None, mean_logprob])),
        min_value=-1.2,
        first_level=draw(st.integers(0, 2)),
        probability=draw(st.sampled_from([0.5, 1.0])),
        max_staleness=draw(st.sampled_from([None, 0, 1])),
        refill=draw(st.booleans()),
    )
    engine = ScriptedEngine(
        random.Random(seed),
        stop_rate=draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.8])),
        publish_rate=draw(st.sampled_from([0.0, 0.02, 0.3])),
        logprobs=(-2.0, 0.0),
    )
    split = draw(st.sampled_from(["even", "logprob_high", "logprob_low", "entropy"]))
    rules = replace(rules, split=split)
    return *grow(rules, engine, seed, prune), rules, prune


@settings(deadline=None, max_examples=500)
@given(grown_by_any_rule())
def test_finished_and_active_paths_never_exceed_the_width(case):
    _, rounds, rules, _ = case
    for planned in rounds:
        assert len(planned.finished) + planned.num_active <= rules.width
        assert all(e.num_runs >= 1 for e in planned.extensions)


@settings(deadline=None, max_examples=500)
@given(grown_by_any_rule())
def test_a_tree_has_exactly_width_whole_leaves_or_says_why_not(case):
    growth, _, rules, prune = case
    tree = tree_of(growth)
    tree.check()
    num_pruned = len(growth.tree.pruned)
    # the places of the first `width` pruned paths are given to others
    unfilled = max(0, num_pruned - rules.width) if prune.refill else num_pruned
    missing = rules.width - unfilled - int(tree.is_whole_L.sum())
    if rules.fallback != "none":
        assert missing == 0
    pruned = (
        "more paths were pruned than the width" if prune.refill else "pruned paths are not refilled"
    )
    expected = [(unfilled, pruned), (missing, "fallback is off")]
    assert tree.provenance.notes == tuple(
        f"{number} leaves fewer than the width: {reason}" for number, reason in expected if number
    )
    assert len(tree.leaves) == num_pruned + int(tree.is_whole_L.sum())


@examples
@given(grown())
def test_every_path_ends_within_the_limit(case):
    growth, _, rules = case
    tree = tree_of(growth)
    assert tree.num_tokens_L.max() <= rules.limit <= rules.segment_tokens * rules.max_depth
    assert rules.limit <= (rules.max_response_tokens or rules.limit)
    for leaf, num_tokens in zip(tree.leaves, tree.num_tokens_L, strict=True):
        if tree.segments[leaf].stop is rules.limit_reason:
            assert num_tokens == rules.limit


@examples
@given(grown())
def test_paths_are_extended_from_the_grid_with_their_recorded_context(case):
    growth, rounds, rules = case
    for extension in (e for planned in rounds for e in planned.extensions):
        assert extension.start % rules.segment_tokens == 0
        path = growth.tree.path(extension.parent)
        assert extension.start == sum(len(growth.tree.segments[i]) for i in path)
    forked = Counter(s.parent for s in growth.tree.segments)
    tree, ends = tree_of(growth), {ROOT: 0}
    for i, segment in enumerate(tree.segments):
        ends[i] = ends[segment.parent] + len(segment)
    assert all(ends[i] % rules.segment_tokens == 0 for i, n in forked.items() if n > 1)


@examples
@given(grown())
def test_a_path_runs_to_completion_exactly_when_the_width_is_spoken_for(case):
    _, rounds, rules = case
    for planned in rounds:
        saturated = len(planned.finished) + planned.num_active == rules.width
        for extension in planned.extensions:
            rest = rules.limit - extension.start
            expected = rest if saturated else min(rules.segment_tokens, rest)
            assert extension.max_new_tokens == expected


@examples
@given(grown())
def test_forks_of_ended_paths_go_to_the_survivors_in_even_shares(case):
    _, rounds, rules = case
    for planned in rounds[1:]:
        if not planned.survivors:
            continue
        num_survivors, room = len(planned.survivors), rules.width - len(planned.finished)
        asked = rules.branching_factor * (planned.num_ended + num_survivors)
        assert planned.num_active == max(num_survivors, min(room, asked))
        assert [e.parent for e in planned.extensions] == planned.survivors
        shares = [e.num_runs for e in planned.extensions]
        assert max(shares) - min(shares) <= 1


@examples
@given(grown())
def test_a_fallback_redoes_at_least_the_last_level_of_an_answered_path(case):
    growth, rounds, rules = case
    num_fallbacks = 0
    for planned in rounds[1:]:
        if planned.survivors:
            continue
        assert rules.fallback != "none"
        num_fallbacks += planned.num_active
        candidates = [i for i in planned.finished if growth.tree.segments[i].stop in ANSWERED]
        wanted = rules.branching_factor * max(1, len(candidates))
        assert planned.num_active == min(rules.width - len(planned.finished), wanted)
        for extension in planned.extensions:
            assert extension.num_runs <= rules.branching_factor
            if extension.parent == ROOT:
                continue
            level = growth.tree.segments[extension.parent].level
            assert any(
                extension.parent in growth.tree.path(leaf)
                and level < growth.tree.segments[leaf].level
                for leaf in candidates
            )
        if not candidates:
            assert [e.parent for e in planned.extensions] == [ROOT]
    assert growth.num_fallbacks == num_fallbacks


@examples
@given(rules=rules_strategy(), seed=st.integers(0, 1000))
def test_the_same_seed_grows_the_same_tree(rules, seed):
    def shape():
        growth, rounds = grow(rules, ScriptedEngine(random.Random(seed), stop_rate=0.1), seed)
        segments = [(s.parent, s.level, s.token_ids.tolist(), s.stop) for s in growth.tree.segments]
        return segments, [r.extensions for r in rounds]

    assert shape() == shape()
