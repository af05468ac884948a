import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tree.scripted import RULES, ScriptedEngine, tree_of
from tests.tree.test_growth_invariants import rules_strategy
from treepo_async.tree.cut import VersionSpan
from treepo_async.tree.growth import start_growth
from treepo_async.tree.regrow import Trunk, fits, kept_trunk, trunk_of
from treepo_async.tree.rules import PruneRules
from treepo_async.types import ROOT, PolicyVersion, Prompt, Segment, StopReason

YOUNG = 5
"""Least policy step in all tests."""
KINDS = ("barrier", "eager", "independent")
PRUNING = PruneRules(min_logprob=-1.5, probability=0.5)


def grow(rules, engine, seed=0, prune=None, trunk=(), *, version=(0, YOUNG), most=10**6):
    """Grow a tree whose runs come back in any order, at most so many of them. Gives the growth and all requests.

    All of it is sampled under `version`; where that is None, as the engine says.
    """
    growth, order = start_growth(rules, random.Random(seed), prune, trunk), random.Random(seed + 1)
    asked = [*growth.start()]
    active = [e for e in asked for _ in range(e.num_runs)]
    for number in range(most):
        assert number <= 8 * rules.width * rules.max_depth, "growth does not end"
        assert len(growth.tree.finished) + len(active) <= rules.width
        if not active:
            return growth, asked
        extension = active.pop(order.randrange(len(active)))
        run, stop = engine.run(extension.max_new_tokens)
        if version is not None:
            run = replace(run, spans=(VersionSpan(PolicyVersion(*version), len(run)),))
        following = growth.add(extension, run, stop, entropy=engine.entropy())
        asked += following
        active += [e for e in following for _ in range(e.num_runs)]
    growth.cut_off()
    return growth, asked


def aged(segments, seed):
    """The segments with policy steps and lineages of all kinds; most paths grow younger from their root on."""
    rng, steps, found = random.Random(seed), {ROOT: 0}, []
    for i, segment in enumerate(segments):
        is_first = segment.parent == ROOT
        steps[i] = rng.choice([3, 4, 5, 6]) if is_first else steps[segment.parent]
        steps[i] += rng.choice([0, 0, 0, 0, 1, -1])
        lineage = int(rng.random() < 0.1)
        found.append(replace(segment, policy_version=PolicyVersion(lineage, max(0, steps[i]))))
    return found


def engine_of(seed, stop_rate, **options):
    rng = random.Random(seed)
    return ScriptedEngine(rng, stop_rate=stop_rate, logprobs=(-2.0, -1.0), **options)


@st.composite
def regrown(draw):
    """Rules, pruning, a trunk of an aged tree that may have been cut off, and the growth that began with it."""
    rules = replace(
        draw(rules_strategy()),
        growth=draw(st.sampled_from(KINDS)),
        max_tree_tokens=draw(st.none() | st.integers(1, 200)),
    )
    prune = draw(st.sampled_from([None, PRUNING, replace(PRUNING, refill=False)]))
    seed, stop_rate = draw(st.integers(0, 10_000)), draw(st.sampled_from([0.0, 0.02, 0.1, 0.3]))
    most = draw(st.sampled_from([10**6, 1, 3, 10]))
    is_aged = draw(st.booleans())
    engine = engine_of(seed, stop_rate, update_rate=0.1 if is_aged else 0.0)
    version = None if is_aged else (0, YOUNG)
    old, _ = grow(rules, engine, seed, prune, version=version, most=most)
    segments = aged(old.tree.segments, seed) if is_aged else old.tree.segments
    trunk = kept_trunk(segments, YOUNG)
    again, asked = grow(rules, engine_of(seed + 7, stop_rate), seed + 7, prune, trunk)
    return rules, segments, trunk, again, asked


examples = settings(deadline=None, max_examples=100)


@settings(deadline=None, max_examples=300)
@given(regrown())
def test_a_regrown_tree_is_a_tree_of_its_rules(case):
    rules, _, trunk, growth, _ = case
    assert fits(trunk, rules)
    tree = tree_of(growth)
    tree.check()
    num_whole = int(tree.is_whole_L.sum())
    assert 1 <= num_whole <= rules.width
    if num_whole < rules.width:
        noted = [int(note.split()[0]) for note in tree.provenance.notes]
        assert sum(noted) == rules.width - num_whole
    else:
        assert tree.provenance.notes == ()
    assert tree.num_tokens_L.max() <= rules.limit


@examples
@given(regrown())
def test_a_regrown_tree_has_no_segment_below_the_least_step_nor_of_two_lineages(case):
    _, segments, _, growth, _ = case
    versions = {segment.policy_version for segment in growth.tree.segments}
    assert min(version.step for version in versions) >= YOUNG
    newest = max(segment.policy_version.lineage for segment in segments)
    assert {version.lineage for version in versions} <= {0, newest}


@examples
@given(regrown())
def test_what_stays_is_the_largest_set_of_young_segments_that_is_closed_under_parents(case):
    _, segments, trunk, _, _ = case
    newest = max(segment.policy_version.lineage for segment in segments)

    def stays(segment):
        version = segment.policy_version
        is_young = version.step >= YOUNG and version.lineage == newest
        return is_young and (segment.parent == ROOT or stays(segments[segment.parent]))

    expected = [segment for segment in segments if stays(segment)]
    assert [s.token_ids.tolist() for s in trunk] == [s.token_ids.tolist() for s in expected]
    for kept, before in zip(trunk, expected, strict=True):
        parent = kept.parent if kept.parent == ROOT else trunk[kept.parent].token_ids.tolist()
        old = before.parent if before.parent == ROOT else segments[before.parent].token_ids.tolist()
        assert parent == old
        assert kept.stop is (None if before.stop is StopReason.PRUNED else before.stop)


@examples
@given(regrown())
def test_kept_segments_stand_first_and_are_what_they_were(case):
    _, _, trunk, growth, _ = case
    for kept, found in zip(trunk, growth.tree.segments, strict=False):
        assert found.token_ids is kept.token_ids
        assert found.behavior_logprobs is kept.behavior_logprobs
        same = ("parent", "level", "policy_version", "mixed_context")
        assert all(getattr(found, name) == getattr(kept, name) for name in same)
        assert found.stop in ({kept.stop} if kept.stop else {None, StopReason.PRUNED})
        if kept.inclusion < 1:
            assert found.inclusion == kept.inclusion, "who was judged is not judged again"
    finished = {i for i, segment in enumerate(trunk) if segment.stop}
    assert finished <= set(growth.tree.finished), "ended paths stay leaves"


@examples
@given(regrown())
def test_forks_lie_on_the_grid_and_every_request_continues_a_recorded_path(case):
    rules, _, _, growth, asked = case
    segments = growth.tree.segments
    children = Counter(segment.parent for segment in segments)
    ends = [growth.tree.end(i) for i in range(len(segments))]
    assert all(ends[i] % rules.segment_tokens == 0 for i, n in children.items() if n > 1 and i >= 0)
    for extension in asked:
        assert extension.start == growth.tree.end(extension.parent)
        assert 0 < extension.max_new_tokens <= rules.limit - extension.start


@examples
@given(regrown())
def test_the_token_budget_holds_but_for_one_path(case):
    rules, _, trunk, growth, _ = case
    if rules.max_tree_tokens is not None:
        num_kept, num_tokens = (sum(map(len, s)) for s in (trunk, growth.tree.segments))
        assert num_tokens <= max(rules.max_tree_tokens, num_kept + rules.limit)


def shape(growth):
    return [
        (s.parent, s.level, s.token_ids.tolist(), s.policy_version, s.stop, s.inclusion)
        for s in growth.tree.segments
    ]


@examples
@given(regrown(), st.integers(0, 1000))
def test_the_same_seed_regrows_the_same_tree(case, seed):
    rules, _, trunk, _, _ = case
    first, second = (grow(rules, engine_of(seed, 0.1), seed, trunk=trunk)[0] for _ in range(2))
    assert shape(first) == shape(second)


@examples
@given(
    rules_strategy(),
    st.sampled_from(KINDS),
    st.sampled_from([None, PRUNING]),
    st.integers(0, 1000),
)
def test_a_whole_young_tree_is_regrown_to_itself_without_a_request(rules, kind, prune, seed):
    rules = replace(rules, growth=kind, fallback="random")
    old, _ = grow(rules, engine_of(seed, 0.1), seed, prune)
    trunk = kept_trunk(old.tree.segments, YOUNG)
    again, asked = grow(rules, engine_of(seed + 1, 0.1), seed + 1, prune, trunk)
    assert asked == []
    assert shape(again) == shape(old)
    assert again.notes() == ()


@examples
@given(rules_strategy(), st.sampled_from(KINDS), st.integers(0, 1000))
def test_a_tree_of_which_nothing_stays_grows_as_usual(rules, kind, seed):
    rules = replace(rules, growth=kind)
    old, _ = grow(rules, engine_of(seed, 0.1), seed, version=(0, YOUNG - 1))
    trunk = kept_trunk(old.tree.segments, YOUNG)
    assert trunk == ()
    usual, regrown = (grow(rules, engine_of(seed, 0.1), seed, trunk=t)[0] for t in ((), trunk))
    assert shape(usual) == shape(regrown)


# ------------------------------------------------------------------ by hand


def segment(parent, level, *, step=YOUNG, lineage=0, stop=None, tokens=4, **fields):
    ids, logprobs = np.arange(tokens, dtype=np.int32), np.full(tokens, -1, np.float32)
    return Segment(parent, level, ids, logprobs, PolicyVersion(lineage, step), stop, **fields)


EOS, PRUNED, LENGTH = StopReason.EOS, StopReason.PRUNED, StopReason.LENGTH
NARROW = replace(RULES, width=4, max_depth=3)


def asked_first(trunk, rules=NARROW):
    """(parent, start, runs) of the requests with which a tree begins."""
    growth = start_growth(rules, random.Random(0), None, tuple(trunk))
    return [(e.parent, e.start, e.num_runs) for e in growth.start()]


def test_the_branch_that_began_late_stays_and_the_prompt_gets_the_fork_that_it_lacks():
    old = [
        segment(ROOT, 0, step=YOUNG - 1),
        segment(ROOT, 0),
        segment(0, 1, stop=EOS),
        segment(1, 1, stop=EOS),
        segment(1, 1),
        segment(4, 2, step=YOUNG - 1, lineage=0, stop=EOS),
    ]
    trunk = kept_trunk(old, YOUNG)
    assert [(s.parent, s.level, s.stop) for s in trunk] == [
        (-1, 0, None),
        (0, 1, EOS),
        (0, 1, None),
    ]
    assert asked_first(trunk) == [(ROOT, 0, 1), (2, 8, 1)]


def test_a_path_that_was_cut_short_goes_on():
    trunk = kept_trunk([segment(ROOT, 0, stop=PRUNED), segment(ROOT, 0, stop=EOS)], YOUNG)
    assert asked_first(trunk) == [(0, 4, 1)]


def test_a_path_that_ended_off_the_grid_goes_on_to_the_grid_alone():
    assert asked_first([segment(ROOT, 0, tokens=3)]) == [(ROOT, 0, 1), (0, 3, 1)]


def test_where_all_paths_have_ended_the_width_is_filled_up_from_them():
    trunk = [segment(ROOT, 0), segment(0, 1, stop=EOS), segment(0, 1, stop=EOS)]
    ((parent, _, num_runs),) = asked_first(
        trunk, replace(NARROW, first_fork_min=1, first_fork_max=1)
    )
    assert parent in (ROOT, 0)
    assert num_runs == 2


def test_what_an_earlier_lineage_sampled_does_not_stay():
    old = [
        segment(ROOT, 0, lineage=0, step=9),
        segment(ROOT, 0, lineage=1),
        segment(0, 1, lineage=1),
    ]
    assert len(kept_trunk(old, YOUNG)) == 1


def test_open_paths_beyond_the_width_stay_cut_off():
    ended = [segment(ROOT, 0, stop=EOS) for _ in range(3)]
    trunk = [*ended, segment(ROOT, 0), segment(ROOT, 0)]
    growth = start_growth(NARROW, random.Random(0), None, tuple(trunk))
    assert len(growth.start()) == 1
    assert [s.stop for s in growth.tree.segments[3:]].count(PRUNED) == 1


def test_an_open_path_is_judged_unless_it_was_and_went_on():
    strict = PruneRules(min_logprob=0.0)
    trunk = (segment(ROOT, 0, stop=EOS), segment(ROOT, 0), segment(ROOT, 0, inclusion=0.5))
    growth = start_growth(NARROW, random.Random(0), strict, trunk)
    assert 2 in {e.parent for e in growth.start()}
    assert [s.stop for s in growth.tree.segments] == [EOS, PRUNED, None]


def test_open_paths_beyond_the_token_budget_stay_cut_off():
    trunk = [segment(ROOT, 0, stop=EOS), segment(ROOT, 0), segment(ROOT, 0)]
    budget = replace(NARROW, max_tree_tokens=12 + 8)
    assert len(asked_first(trunk, budget)) == 1
    assert len(asked_first(trunk, replace(budget, max_tree_tokens=12 + 16))) == 2


@pytest.mark.parametrize(
    ("trunk", "is_fit"),
    [
        ([], True),
        ([segment(ROOT, 0), segment(0, 1), segment(1, 2, stop=LENGTH)], True),
        ([segment(ROOT, 0), segment(0, 1), segment(1, 2)], False),
        ([segment(ROOT, 0), segment(0, 1, stop=LENGTH)], False),
        ([segment(ROOT, 0), segment(0, 1), segment(1, 2, stop=StopReason.DEPTH)], False),
        ([segment(ROOT, 0), segment(0, 1), segment(1, 2), segment(2, 3, stop=EOS)], False),
        ([segment(ROOT, 0, tokens=5)], False),
        ([segment(ROOT, 1)], False),
        ([segment(ROOT, 0, stop=EOS)] * 4, True),
        ([segment(ROOT, 0, stop=EOS)] * 5, False),
    ],
    ids=[
        "empty",
        "whole",
        "open at limit",
        "below limit",
        "other limit",
        "beyond limit",
        "long",
        "level",
        "width",
        "too wide",
    ],
)
def test_a_trunk_must_fit_the_rules(trunk, is_fit):
    assert fits(tuple(trunk), NARROW) is is_fit


def test_a_tree_of_another_prompt_or_otherwise_sampled_leaves_nothing():
    growth, _ = grow(NARROW, engine_of(0, 0.1))
    tree = tree_of(growth)
    found = trunk_of(tree, tree.prompt, tree.sampling, NARROW, YOUNG)
    assert found == Trunk(tuple(growth.tree.segments), tree.num_tokens)
    assert found.notes == (f"regrown: {tree.num_tokens} of {tree.num_tokens} tokens kept",)
    other = Prompt("p", np.array([1, 2], np.int32), "", "")
    warmer = replace(tree.sampling, temperature=2.0)
    for nothing in (
        trunk_of(tree, other, tree.sampling, NARROW, YOUNG),
        trunk_of(tree, tree.prompt, warmer, NARROW, YOUNG),
        trunk_of(tree, tree.prompt, tree.sampling, replace(NARROW, width=1), YOUNG),
        trunk_of(tree, tree.prompt, tree.sampling, NARROW, YOUNG + 1),
    ):
        assert nothing == Trunk((), tree.num_tokens)
        assert nothing.notes == (f"regrown: 0 of {tree.num_tokens} tokens kept",)
    assert Trunk().notes == ()
