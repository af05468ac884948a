"""Eager and independent growth, splits by score, and the token budget."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tree.scripted import RULES, ScriptedEngine, grow, grow_eagerly, tree_of
from tests.tree.test_growth_invariants import rules_strategy
from treepo_async.types import ROOT, StopReason

EAGER = replace(RULES, growth="eager")
INDEPENDENT = replace(RULES, growth="independent")

stop_rates = st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.8])
seeds = st.integers(0, 10_000)


@settings(deadline=None, max_examples=500)
@given(rules=rules_strategy(), seed=seeds, stop_rate=stop_rates)
def test_eager_growth_keeps_to_the_width_at_every_moment(rules, seed, stop_rate):
    rules = replace(rules, growth="eager")
    growth, moments = grow_eagerly(rules, ScriptedEngine(random.Random(seed), stop_rate), seed)
    for num_finished, active in moments:
        assert num_finished + len(active) <= rules.width
        assert all(e.num_runs == 1 for e in active)
    tree = tree_of(growth)
    tree.check()
    if rules.fallback != "none":
        assert len(tree.leaves) == rules.width


def test_an_eager_path_forks_before_its_siblings_are_back():
    growth, moments = grow_eagerly(EAGER, ScriptedEngine(random.Random(0)))
    (_, first), (_, second), *_ = moments
    assert [e.parent for e in first] == [ROOT, ROOT]
    assert Counter(e.parent for e in second) == {ROOT: 1, 0: 2}
    assert len(tree_of(growth).leaves) == EAGER.width


def test_eager_growth_depends_on_who_is_back_first_and_barrier_growth_does_not():
    def shapes(drive, rules):
        return {
            tuple(s.parent for s in drive(rules, engine, seed)[0].tree.segments)
            for seed in range(10)
            for engine in [ScriptedEngine(random.Random(0))]
        }

    assert len(shapes(grow, RULES)) == 1
    assert len(shapes(grow_eagerly, EAGER)) > 5


@settings(deadline=None, max_examples=200)
@given(rules=rules_strategy(), seed=seeds, stop_rate=stop_rates)
def test_independent_responses_share_the_prompt_alone(rules, seed, stop_rate):
    rules = replace(rules, growth="independent")
    growth, rounds = grow(rules, ScriptedEngine(random.Random(seed), stop_rate), seed)
    tree = tree_of(growth)
    tree.check()
    assert len(tree.leaves) == rules.width
    assert tree.num_tokens == tree.num_delivered_tokens
    assert len(rounds) == 1
    assert growth.num_fallbacks == 0


@settings(deadline=None, max_examples=500)
@given(
    rules=rules_strategy(),
    seed=seeds,
    stop_rate=stop_rates,
    budget=st.integers(1, 400),
    kind=st.sampled_from(["barrier", "eager", "independent"]),
)
def test_no_tree_is_larger_than_its_budget_or_than_one_path(rules, seed, stop_rate, budget, kind):
    rules = replace(rules, growth=kind, max_tree_tokens=budget)
    drive = grow_eagerly if kind == "eager" else grow
    growth, _ = drive(rules, ScriptedEngine(random.Random(seed), stop_rate), seed)
    tree = tree_of(growth)
    assert tree.num_tokens <= max(budget, rules.limit)
    missing = rules.width - len(tree.leaves)
    assert bool(missing) == bool(growth.notes())
    if rules.fallback == "none" and kind != "independent":
        return
    room = budget - tree.num_tokens
    assert missing == 0 or room < rules.limit, "there was room for one path more"


def test_a_budget_is_named_where_it_costs_leaves():
    growth, _ = grow(replace(RULES, max_tree_tokens=51), ScriptedEngine(random.Random(0)))
    # two paths of 24 tokens; a fork at the last boundary would cost 4 more
    assert len(growth.tree.finished) == 2
    assert growth.notes() == ("14 leaves fewer than the width: the token budget is spent",)


@pytest.mark.parametrize(("rule", "richest"), [("logprob_high", max), ("logprob_low", min)])
def test_forks_go_to_the_path_whose_last_level_the_rule_prefers(rule, richest):
    rules = replace(RULES, width=11, split=rule, split_temperature=0.05)
    growth, rounds = grow(rules, ScriptedEngine(random.Random(5), logprobs=(-3.0, 0.0)))
    logprob = growth.tree.last_level_logprob
    by_share = {e.parent: e.num_runs for e in rounds[2].extensions}
    favourite = max(by_share, key=by_share.__getitem__)
    assert by_share[favourite] == 5
    assert favourite == richest(by_share, key=logprob)


def test_forks_go_to_the_boundary_of_highest_entropy():
    class Surprised(ScriptedEngine):
        def entropy(self):
            return float(next(entropies))

    entropies = iter([0.1, 2.0, *[1.0] * 100])
    rules = replace(RULES, width=11, split="entropy", split_temperature=0.1)
    _, rounds = grow(rules, Surprised(random.Random(0)))
    assert [e.num_runs for e in rounds[1].extensions] == [1, 3]


@pytest.mark.parametrize(("rule", "starts"), [("from_start", {0}), ("low_confidence", {0, 4, 8})])
def test_other_fallbacks_begin_where_their_rule_says(rule, starts):
    shape = {"width": 2, "branching_factor": 1, "first_fork_min": 1, "first_fork_max": 1}
    rules, found = replace(RULES, **shape, fallback=rule, max_depth=3), set()
    for seed in range(100):
        engine = ScriptedEngine(random.Random(seed), reasons=(StopReason.EOS,), stop_rate=0.1)
        growth, rounds = grow(rules, engine, seed)
        # one path alone up to its end, and then a fallback
        planned = next(r for r in rounds if r.finished)
        if growth.tree.segments[planned.finished[0]].level == 2 and growth.num_fallbacks:
            found.update(e.start for e in planned.extensions)
    assert found == starts
