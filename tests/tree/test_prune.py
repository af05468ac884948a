import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tree.scripted import ANSWERED, RULES, ScriptedEngine, grow, grow_eagerly, tree_of
from tests.tree.test_growth_invariants import rules_strategy
from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.tree.growth import start_growth
from treepo_async.tree.prune import KEEP, PRUNE, judge, mean_logprob
from treepo_async.tree.rules import PartialPath, PruneRules
from treepo_async.types import PolicyVersion, StopReason

POOR_HALF = PruneRules(min_logprob=-1.0)
"""With log-probs drawn from -2..0, half of all paths are poor at each boundary."""


def engine(seed=0, stop_rate=0.0):
    return ScriptedEngine(random.Random(seed), stop_rate=stop_rate, logprobs=(-2.0, 0.0))


def path(*logprobs):
    return PartialPath(np.arange(len(logprobs), dtype=np.int32), np.array(logprobs, np.float32))


def judged(rules, *, level=1, level_logprob=-1.0, value_of=None, seed=0):
    this = path(-1.0, -3.0)
    return judge(
        rules,
        this,
        [this],
        level=level,
        level_logprob=level_logprob,
        rng=random.Random(seed),
    )


@pytest.mark.parametrize(
    ("rules", "verdict"),
    [
        (PruneRules(), KEEP),
        (PruneRules(min_logprob=-1.5), KEEP),
        (PruneRules(min_logprob=-0.5), PRUNE),
        (PruneRules(min_logprob=-0.5, first_level=2), KEEP),
        (PruneRules(min_logprob=-0.5, first_level=1), PRUNE),
        (PruneRules(value=mean_logprob, min_value=-1.9), PRUNE),
        (PruneRules(value=mean_logprob, min_value=-2.1), KEEP),
        (PruneRules(value=lambda *_: math.nan, min_value=9.0), KEEP),
    ],
)
def test_a_path_is_judged_by_each_rule_that_is_set(rules, verdict):
    assert judged(rules) == verdict


def test_what_goes_on_by_chance_says_how_likely_that_was():
    rules = PruneRules(min_logprob=-0.5, probability=0.75)
    verdicts = [judged(rules, seed=seed) for seed in range(400)]
    kept = [v for v in verdicts if not v.is_pruned]
    assert 60 < len(kept) < 140
    assert {v.inclusion for v in kept} == {0.25}


def test_pruned_paths_are_leaves_without_descendants_and_others_take_their_place():
    growth, rounds = grow(RULES, engine(), prune=POOR_HALF)
    tree = tree_of(growth)
    tree.check()
    stops = [tree.segments[leaf].stop for leaf in tree.leaves]
    assert growth.tree.pruned
    assert stops.count(StopReason.PRUNED) == len(growth.tree.pruned)
    assert len(stops) - len(growth.tree.pruned) == RULES.width
    assert growth.notes() == ()
    # judged at every boundary, also once the tree is as wide as it may be
    assert all(e.max_new_tokens == 4 for r in rounds for e in r.extensions)


def test_without_refill_a_tree_has_a_leaf_less_for_every_pruned_path():
    rules = replace(POOR_HALF, refill=False)
    growth, _ = grow(RULES, engine(1, stop_rate=0.05), prune=rules)
    num_pruned = len(growth.tree.pruned)
    assert 0 < num_pruned < RULES.width
    assert len(growth.tree.finished) == RULES.width - num_pruned
    assert growth.notes() == (
        f"{num_pruned} leaves fewer than the width: pruned paths are not refilled",
    )


def test_after_saturation_a_freed_place_goes_to_a_fallback_at_once():
    growth, rounds = grow(RULES, engine(3, stop_rate=0.02), prune=POOR_HALF)
    was_saturated, num_refilled = False, 0
    for planned in rounds:
        survivors = set(planned.survivors) - set(growth.tree.pruned)
        if was_saturated and survivors:
            own = [e for e in planned.extensions if e.parent in survivors]
            others = [e for e in planned.extensions if e.parent not in survivors]
            assert [e.num_runs for e in own] == [1] * len(survivors)
            answered = [i for i in planned.finished if growth.tree.segments[i].stop in ANSWERED]
            missing = RULES.width - len(planned.finished) - len(survivors)
            expected = min(missing, RULES.branching_factor * max(1, len(answered)))
            assert sum(e.num_runs for e in others) == expected
            num_refilled += expected
        was_saturated = planned.num_active + len(planned.finished) == RULES.width
    assert num_refilled > 0


@pytest.mark.parametrize(("drive", "kind"), [(grow, "barrier"), (grow_eagerly, "eager")])
def test_a_tree_whose_paths_are_all_poor_ends_all_the_same(drive, kind):
    prune = PruneRules(min_logprob=-0.5)
    growth, _ = drive(replace(RULES, growth=kind), ScriptedEngine(random.Random(0)), prune=prune)
    assert len(growth.tree.pruned) == RULES.width
    assert len(growth.tree.finished) == RULES.width


@pytest.mark.parametrize(("drive", "kind"), [(grow, "barrier"), (grow_eagerly, "eager")])
@pytest.mark.parametrize("rules", [{"fallback": "none"}, {}])
@pytest.mark.parametrize("refill", [True, False])
def test_no_tree_is_left_without_a_complete_path(drive, kind, rules, refill):
    prune = PruneRules(min_logprob=-0.5, refill=refill)
    rules = replace(RULES, growth=kind, **rules)
    growth, _ = drive(rules, ScriptedEngine(random.Random(0)), prune=prune)
    assert len(growth.tree.finished) >= 1


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    stop_rate=st.sampled_from([0.0, 0.05, 0.3]),
    probability=st.sampled_from([0.3, 1.0]),
    refill=st.booleans(),
    eager=st.booleans(),
)
def test_pruning_never_breaks_the_width(seed, stop_rate, probability, refill, eager):
    prune = PruneRules(min_logprob=-1.2, probability=probability, refill=refill)
    rules = replace(RULES, growth="eager" if eager else "barrier")
    growth, _ = (grow_eagerly if eager else grow)(rules, engine(seed, stop_rate), seed, prune)
    tree = tree_of(growth)
    tree.check()
    num_finished, num_pruned = len(growth.tree.finished), len(growth.tree.pruned)
    assert len(tree.leaves) == num_finished + num_pruned
    assert num_finished == (RULES.width if refill else RULES.width - num_pruned)
    lucky = [s.inclusion for s in tree.segments if s.inclusion != 1]
    assert set(lucky) <= {1 - probability}
    if probability == 1:
        assert lucky == []


def test_a_path_too_old_for_any_batch_is_pruned_and_others_are_not():
    growth = start_growth(RULES, random.Random(0), PruneRules(max_staleness=1))
    (first,) = growth.start()
    add(growth, first, step=3)
    second = add(growth, first, step=5)
    assert growth.tree.pruned == [0]
    # its forks go to the other one
    assert [(e.parent, e.num_runs) for e in second] == [(1, 4)]
    for _ in range(4):
        following = add(growth, second[0], step=6)
    # one publication older than the newest token is not too old
    assert growth.tree.pruned == [0]
    assert len(following) == 4


def test_no_fallback_hangs_on_a_prefix_that_is_too_old():
    rules = replace(RULES, width=2, first_fork_min=1, first_fork_max=1, branching_factor=1)
    starts = set()
    for seed in range(20):
        growth = start_growth(rules, random.Random(seed), PruneRules(max_staleness=1))
        (first,) = growth.start()
        (second,) = add(growth, first, step=5)
        (third,) = add(growth, second, step=6)
        (fallback,) = add(growth, third, step=7, stop=StopReason.EOS)
        starts.add(fallback.start)
    # behind the first level there are tokens of step 5, beside tokens of step 7
    assert starts == {0}


def stale_leaves(growth, bound):
    """Whole leaves with a token that is older than the bound beside the newest token of the tree."""
    tree = tree_of(growth)
    newest = max(s.policy_version.step for s in tree.segments)
    oldest = (
        min(tree.segments[i].policy_version.step for i in tree.path(leaf))
        for leaf in growth.tree.finished
    )
    return [step for step in oldest if step < newest - bound]


DRIVES = {"barrier": grow, "eager": grow_eagerly, "independent": grow}


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(sorted(DRIVES)),
    rules=rules_strategy(),
    seed=st.integers(0, 1000),
    stop_rate=st.sampled_from([0.0, 0.1, 0.5]),
    publish_rate=st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    bound=st.integers(0, 2),
    refill=st.booleans(),
)
def test_under_endless_updates_growth_ends_and_no_whole_leaf_is_too_old(
    kind, rules, seed, stop_rate, publish_rate, bound, refill
):
    rules = replace(rules, growth=kind)
    busy = ScriptedEngine(random.Random(seed), stop_rate, publish_rate=publish_rate)
    growth, _ = DRIVES[kind](rules, busy, seed, PruneRules(max_staleness=bound, refill=refill))
    assert stale_leaves(growth, bound) == []
    tree, num_pruned = tree_of(growth), len(growth.tree.pruned)
    tree.check()
    assert len(tree.leaves) == len(growth.tree.finished) + num_pruned
    assert num_pruned <= (2 * rules.width if refill else rules.width)


@pytest.mark.parametrize("kind", DRIVES)
def test_the_rule_of_age_holds_also_once_the_tree_is_as_wide_as_it_may_be(kind):
    def grown(bound):
        busy = ScriptedEngine(random.Random(1), stop_rate=0.03, publish_rate=0.05)
        rules = replace(RULES, growth=kind)
        return DRIVES[kind](rules, busy, 1, PruneRules(max_staleness=bound))[0]

    whole, growth = grown(None), grown(4)
    assert stale_leaves(whole, 4), "control: without the rule there are such leaves"
    assert stale_leaves(growth, 4) == []
    assert growth.tree.finished
    # a request for a path's rest is one request all the same
    lengths = {len(tree_of(growth).path(leaf)) for leaf in growth.tree.pruned}
    assert max(lengths) > 1


def test_the_first_pruned_paths_are_refilled_and_those_beyond_the_width_are_not():
    """Every token is of another version, so that each path of two tokens or more is too old."""
    busy = ScriptedEngine(random.Random(0), publish_rate=1.0)
    growth, _ = grow(RULES, busy, prune=PruneRules(max_staleness=0))
    assert growth.tree.finished == []
    assert len(growth.tree.pruned) == 2 * RULES.width
    assert growth.notes() == (
        "16 leaves fewer than the width: more paths were pruned than the width",
    )


def test_a_whole_path_is_pruned_once_a_later_token_makes_it_too_old():
    rules = replace(RULES, width=2)
    growth = start_growth(rules, random.Random(0), PruneRules(max_staleness=1))
    (first,) = growth.start()
    add(growth, first, step=3, stop=StopReason.EOS)
    following = add(growth, first, step=5, stop=StopReason.EOS)
    stops = [s.stop for s in growth.tree.segments if s.stop is not None]
    assert stops == [StopReason.PRUNED, StopReason.EOS]
    assert growth.tree.finished == [11]
    # its place is taken
    assert sum(e.num_runs for e in following) == 1


def test_a_tree_that_is_cut_off_keeps_no_whole_path_that_is_too_old():
    rules = replace(RULES, width=3, first_fork_min=3, first_fork_max=3)
    growth = start_growth(rules, random.Random(0), PruneRules(max_staleness=1))
    (first,) = growth.start()
    for step in (3, 5):
        add(growth, first, step=step, stop=StopReason.EOS)
    assert growth.cut_off() == 1
    assert stale_leaves(growth, 1) == []
    # what is whole and too old was decoded in full
    assert growth.tree.saved_tokens() == 0


def add(growth, extension, *, step, stop=None):
    num_tokens = extension.max_new_tokens
    logprobs = np.full(num_tokens, -1.0, np.float32)
    spans = (VersionSpan(PolicyVersion(0, step), num_tokens),)
    return growth.add(extension, Run(np.arange(num_tokens, dtype=np.int32), logprobs, spans), stop)


def test_saved_tokens_are_what_cut_paths_lack_to_the_mean_of_the_others():
    rules = replace(RULES, width=4, first_fork_min=4, first_fork_max=4, max_response_tokens=12)
    growth = start_growth(rules, random.Random(0))
    (first,) = growth.start()
    runs = [
        (12, None),
        (8, StopReason.EOS),
        (4, StopReason.REPETITION),
        (11, StopReason.REPETITION),
    ]
    for num_tokens, stop in runs:
        run = ScriptedEngine(random.Random(0)).run(num_tokens)[0]
        growth.add(first, run, stop)
    # the mean of 12 and 8, less 4; the second is longer than that
    assert growth.tree.saved_tokens() == 6
    assert growth.tree.num_cut_short() == 2
