import asyncio
import math
import random
from dataclasses import replace
from string import ascii_lowercase, ascii_uppercase, digits

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import (
    EOS,
    ScriptedEngine,
    ascii_settings,
    engine_failure,
    logprob_of,
    numbered_prompt,
    until,
)
from treepo_async.actor.__main__ import _settings
from treepo_async.actor.expand import expand
from treepo_async.config.command_line import parse
from treepo_async.errors import DeadlineError, EngineError
from treepo_async.tree.cut import Run, VersionSpan
from treepo_async.tree.rules import PruneRules
from treepo_async.types import ROOT, PolicyVersion, Sampling, StopReason, Tree, leaves_of

PROMPT = numbered_prompt(0)
PROMPT_TOKENS = PROMPT.token_ids.tolist()
SETTINGS = ascii_settings()
ENDLESS = replace(SETTINGS.stops, repetition_count=0)


async def grow(engine, settings=SETTINGS, *, seed=0, prompt=PROMPT, least_step=0):
    return await expand(
        prompt,
        engine,
        settings,
        random.Random(seed),
        lease_id="lease",
        actor="actor-0",
        least_step=least_step,
    )


def tree_of(segments, provenance, settings=SETTINGS):
    rules = settings.growth
    unknown_L = np.zeros(len(leaves_of(segments)), np.float32)
    sampling = Sampling(
        settings.sampling.temperature,
        rules.segment_tokens,
        rules.max_depth,
        rules.width,
        rules.branching_factor,
    )
    return Tree(PROMPT, segments, unknown_L, unknown_L, sampling, provenance)


def response(tree, leaf):
    return [t for i in tree.path(leaf) for t in tree.segments[i].token_ids.tolist()]


def scripted(text, **options):
    """An engine whose every path follows one text."""
    tokens = [EOS if c == "$" else ord(c) for c in text]

    def go_on(prefix, _number, _is_greedy):
        return tokens[len(prefix) - len(PROMPT_TOKENS) :]

    return ScriptedEngine(script=go_on, **options)


@given(seed=st.integers(0, 2**16), eos_rate=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))
def test_a_tree_keeps_to_its_rules_whatever_the_engine_says(seed, eos_rate):
    engine = ScriptedEngine(seed=seed, eos_rate=eos_rate)
    segments, provenance = asyncio.run(grow(engine, seed=seed))
    tree = tree_of(segments, provenance)
    tree.check()
    assert len(tree.leaves) == SETTINGS.growth.width
    for leaf in tree.leaves:
        tokens, stop = response(tree, leaf), tree.segments[leaf].stop
        assert len(tokens) <= SETTINGS.growth.limit
        assert (stop is StopReason.EOS) == (tokens[-1] == EOS)
        assert (stop is StopReason.LENGTH) <= (len(tokens) == SETTINGS.growth.limit)
        assert EOS not in tokens[:-1]


async def test_every_token_and_log_prob_is_what_the_engine_returned_for_its_place():
    engine = ScriptedEngine(seed=3, version=PolicyVersion(0, 4))
    segments, provenance = await grow(engine)
    tree = tree_of(segments, provenance)
    for i, segment in enumerate(segments):
        before = len(PROMPT_TOKENS) + sum(len(segments[k]) for k in tree.path(i)[:-1])
        expected = [logprob_of(t, before + k) for k, t in enumerate(segment.token_ids.tolist())]
        np.testing.assert_array_equal(segment.behavior_logprobs, np.array(expected, np.float32))
        assert segment.policy_version == PolicyVersion(0, 4)
    # a path is the prefix that was submitted and what came back for it, nothing else
    submitted = {tuple(r.prefix) for r in engine.requests}
    returned = [tuple(run) for run in engine.runs]
    for leaf in tree.leaves:
        whole = (*PROMPT_TOKENS, *response(tree, leaf))
        assert any(
            whole[:cut] in submitted
            and any(run[: len(whole) - cut] == whole[cut:] for run in returned)
            for cut in range(1, len(whole))
        )


async def test_only_whole_paths_are_submitted_and_only_the_root_is_new_to_the_cache():
    engine = ScriptedEngine(seed=5)
    await grow(engine, least_step=7)
    root, *others = engine.requests
    assert root.prefix == PROMPT_TOKENS
    assert not root.is_cached
    assert all(r.is_cached for r in others if r.prefix != PROMPT_TOKENS)
    assert {r.least_step for r in engine.requests} == {7}
    assert {r.sampling for r in engine.requests} == {SETTINGS.sampling}
    for request in engine.requests:
        assert tuple(request.prefix[: len(PROMPT_TOKENS)]) == tuple(PROMPT_TOKENS)
        # no stop of an earlier run may be inside of what is continued
        assert EOS not in request.prefix


async def test_costs_are_counted_request_by_request():
    engine = ScriptedEngine(seed=1)
    segments, provenance = await grow(engine)
    sampled = sum(len(s) for s in segments)
    assert provenance.num_requests == len(engine.runs)
    assert provenance.decoded_tokens == sum(map(len, engine.runs))
    assert provenance.decoded_tokens == sampled + provenance.wasted_tokens
    assert provenance.prefix_tokens == sum(r.num_runs * len(r.prefix) for r in engine.requests)
    assert provenance.cached_tokens == sum(
        r.num_runs * (len(r.prefix) - 1) for r in engine.requests if r.is_cached
    )
    assert provenance.overhead_s == pytest.approx(0.001 * len(engine.runs))
    assert (provenance.lease_id, provenance.actor) == ("lease", "actor-0")


@pytest.mark.parametrize(
    ("text", "kept", "stop"),
    [
        ("abc$", "abc", StopReason.EOS),
        (r"a\boxed{7}zzyx", r"a\boxed{7}", StopReason.BOXED),
        (r"a\boxed{7}$zyx", r"a\boxed{7}", StopReason.EOS),
        ("abcdxyxyefgh$", "abcdxyxy", StopReason.REPETITION),
        ("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrst", StopReason.LENGTH),
    ],
)
async def test_each_stop_ends_a_path_at_its_token_and_the_rest_is_waste(text, kept, stop):
    settings = ascii_settings(width=1, first_fork_min=1, first_fork_max=1, fallback="none")
    segments, provenance = await grow(scripted(text), settings)
    tree = tree_of(segments, provenance, settings)
    (leaf,) = tree.leaves
    tokens = response(tree, leaf)
    assert "".join(chr(t) for t in tokens if t != EOS) == kept
    assert (tokens[-1] == EOS) == (stop is StopReason.EOS)
    assert segments[leaf].stop is stop
    # the path ran to completion in one request of at most the limit
    assert provenance.decoded_tokens == min(len(text), settings.growth.limit)
    assert provenance.wasted_tokens == provenance.decoded_tokens - len(tokens)


async def test_an_engine_error_is_passed_on_and_stops_the_other_requests():
    engine = ScriptedEngine(eos_rate=0.0, failures={2: engine_failure()})
    with pytest.raises(EngineError, match="the server is gone"):
        await grow(engine)
    assert len(engine.requests) < 10
    await until(lambda: not other_tasks())


def other_tasks():
    return asyncio.all_tasks() - {asyncio.current_task()}


async def test_a_deadline_is_passed_on_as_it_is():
    engine = ScriptedEngine(failures={0: DeadlineError("the gate", "engine host", 1)})
    with pytest.raises(DeadlineError, match="engine host should have ended it"):
        await grow(engine)


@pytest.mark.parametrize("tokens", [[], [65, 66]], ids=["empty", "short"])
async def test_a_run_that_is_too_short_without_a_stop_is_refused(tokens):
    with pytest.raises(EngineError, match=r"returned (no token|2 of 4 tokens without a stop)"):
        await grow(ScriptedEngine(script=lambda *_: tokens))


async def test_a_prompt_does_not_wait_for_another_one():
    held = asyncio.Event()
    engine = ScriptedEngine(held={numbered_prompt(1).token_ids[0]: held})
    slow = asyncio.create_task(grow(engine, prompt=numbered_prompt(1)))
    async with asyncio.timeout(5):
        segments, _ = await grow(engine)
    assert segments
    assert not slow.done()
    held.set()
    async with asyncio.timeout(5):
        await slow


async def test_the_same_answers_and_seed_give_the_same_tree():
    first, _ = await grow(ScriptedEngine(seed=2), seed=9)
    second, _ = await grow(ScriptedEngine(seed=2), seed=9)
    other, _ = await grow(ScriptedEngine(seed=3), seed=9)

    def shape(segments):
        return [(s.parent, s.token_ids.tolist()) for s in segments]

    assert shape(first) == shape(second)
    assert shape(first) != shape(other)


async def test_a_long_request_is_ended_at_its_stop_and_what_came_behind_is_waste():
    text = r"abc\boxed{7}" + "xyz" * 20
    rules = {"width": 1, "first_fork_min": 1, "first_fork_max": 1, "max_depth": 20}
    whole = ascii_settings(**rules, fallback="none")
    watched = replace(whole, stream_tokens=8)
    (one,), whole_cost = await grow_leaf(scripted(text), whole)
    (other,), watched_cost = await grow_leaf(scripted(text), watched)
    assert one == other == r"abc\boxed{7}"
    assert whole_cost.decoded_tokens == 72
    # looked at after 1, 9 and 17 tokens, and the box ends on the twelfth
    assert watched_cost.decoded_tokens == 17
    assert watched_cost.wasted_tokens == 5


async def grow_leaf(engine, settings):
    segments, cost = await grow(engine, settings)
    tree = tree_of(segments, cost, settings)
    return ["".join(map(chr, response(tree, leaf))) for leaf in tree.leaves], cost


@given(
    text=st.text(alphabet="ab\\boxed{}12xy", min_size=60, max_size=80), stream=st.integers(1, 30)
)
def test_watching_a_request_never_changes_its_tree(text, stream):
    rules = {"width": 2, "max_depth": 12, "first_fork_min": 2, "first_fork_max": 2}
    whole = ascii_settings(**rules, fallback="none")
    watched = replace(whole, stream_tokens=stream)
    first, first_cost = asyncio.run(grow(scripted(text), whole))
    second, second_cost = asyncio.run(grow(scripted(text), watched))
    assert [(s.parent, s.token_ids.tolist(), s.stop) for s in first] == [
        (s.parent, s.token_ids.tolist(), s.stop) for s in second
    ]
    assert second_cost.decoded_tokens <= first_cost.decoded_tokens


async def test_an_end_of_sequence_behind_a_box_is_waited_for():
    """The look after nine tokens sees the box, and not yet what belongs to it."""
    rules = {"width": 1, "first_fork_min": 1, "first_fork_max": 1, "max_depth": 20}
    settings = replace(ascii_settings(**rules, fallback="none"), stream_tokens=8)
    segments, cost = await grow(scripted(r"\boxed{7}$" + "x" * 60), settings)
    assert segments[-1].stop is StopReason.EOS
    assert cost.decoded_tokens == 17


async def test_repetition_is_seen_in_every_run_of_a_request():
    rules = {"width": 4, "first_fork_min": 4, "first_fork_max": 4, "max_depth": 20}
    settings = replace(ascii_settings(**rules, fallback="none"), stream_tokens=4)
    _, cost = await grow(scripted("aaaa" * 20), settings)
    # the first segment repeats itself in its third token; looked at after 1 and 5
    assert cost.decoded_tokens == 4 * 5


@pytest.mark.parametrize("end", range(4, 24))
async def test_a_request_ends_at_the_first_look_that_can_see_the_repetition(end):
    rules = {"width": 1, "first_fork_min": 1, "first_fork_max": 1, "max_depth": 20}
    settings = replace(ascii_settings(**rules, fallback="none"), stream_tokens=8)
    text = ascii_uppercase[: end - 4] + "xyxy" + ascii_lowercase[:23] + digits
    (leaf,), cost = await grow_leaf(scripted(text), settings)
    assert leaf == text[:end]
    assert cost.decoded_tokens == next(look for look in (1, 9, 17, 25) if look >= end)


async def test_nothing_is_watched_where_nothing_but_the_engine_ends_a_path():
    engine = ScriptedEngine(eos_rate=0.0)
    stops = replace(SETTINGS.stops, boxed_end=None, repetition_count=0)
    await grow(engine, replace(SETTINGS, stream_tokens=4, stops=stops))
    assert not any(r.is_watched for r in engine.requests)


async def test_only_requests_beyond_the_limit_are_watched():
    engine = ScriptedEngine(eos_rate=0.0)
    await grow(engine, replace(SETTINGS, stream_tokens=4))
    watched = {r.max_new_tokens for r in engine.requests if r.is_watched}
    others = {r.max_new_tokens for r in engine.requests if not r.is_watched}
    assert others == {4}
    assert watched
    assert min(watched) > 4


@pytest.mark.parametrize("growth", ["eager", "independent"])
async def test_other_kinds_of_growth_keep_to_the_width_and_warm_the_prompt(growth):
    settings = ascii_settings(growth=growth)
    engine = ScriptedEngine(seed=4, eos_rate=0.05)
    segments, provenance = await grow(engine, settings)
    tree = tree_of(segments, provenance, settings)
    tree.check()
    assert len(tree.leaves) == SETTINGS.growth.width
    # with several requests for the prompt the first of them would not find it in the cache
    assert engine.warmed == ([PROMPT_TOKENS] if growth == "eager" else [])
    roots = [r for r in engine.requests if r.prefix == PROMPT_TOKENS]
    assert [r.num_runs for r in roots][:1] == [1 if growth == "eager" else 6]


async def test_an_eager_child_is_asked_for_while_its_siblings_still_run():
    held = asyncio.Event()

    class OneSlow(ScriptedEngine):
        async def extend(self, prefix, **options):
            if len(self.requests) == 1:
                self.requests.append(None)
                await held.wait()
            return await super().extend(prefix, **options)

    engine = OneSlow(eos_rate=0.0)
    growing = asyncio.create_task(grow(engine, ascii_settings(growth="eager")))
    await until(lambda: len(engine.requests) > 6)
    assert not growing.done()
    held.set()
    async with asyncio.timeout(5):
        await growing


async def test_a_pruned_path_costs_what_it_decoded_and_says_what_it_saved():
    prune = PruneRules(min_logprob=-0.06, first_level=1)
    settings = replace(ascii_settings(), stops=ENDLESS, prune=prune)
    segments, provenance = await grow(ScriptedEngine(seed=1, eos_rate=0.0), settings)
    tree = tree_of(segments, provenance, settings)
    pruned = [leaf for leaf in tree.leaves if segments[leaf].stop is StopReason.PRUNED]
    assert pruned
    assert provenance.num_pruned == len(pruned)
    limit = settings.growth.limit
    ends = tree.num_tokens_L[[tree.leaves.index(leaf) for leaf in pruned]]
    assert provenance.saved_tokens == sum(limit - ends)
    assert tree.num_delivered_tokens == limit * settings.growth.width


class MovingEngine(ScriptedEngine):
    """Weights change behind every tenth token of a request, which goes on."""

    def _complete(self, prefix, max_new_tokens, sampling, is_cached, least_step, watch):
        whole = super()._complete(prefix, max_new_tokens, sampling, is_cached, least_step, None)
        run, number = whole.run, len(whole.run)
        if watch is not None and watch.is_outdated is not None:
            looks = range(1, number, watch.every_tokens)
            outdated = (n for n in looks if watch.is_outdated(spans_of_ten(n)))
            number = next(outdated, number)
        run = Run(run.token_ids[:number], run.behavior_logprobs[:number], spans_of_ten(number))
        return replace(whole, run=run)


def spans_of_ten(number):
    return tuple(
        VersionSpan(PolicyVersion(0, step), min(10, number - 10 * step))
        for step in range(math.ceil(number / 10))
    )


def aging(*, stream_tokens, **rules):
    """Settings of one path of 64 tokens, too old with those of two versions before."""
    one = {"width": 1, "first_fork_min": 1, "first_fork_max": 1, "max_depth": 16}
    return replace(
        ascii_settings(**one, **rules),
        stops=ENDLESS,
        prune=PruneRules(max_staleness=1),
        stream_tokens=stream_tokens,
    )


@pytest.mark.parametrize("growth", ["barrier", "eager", "independent"])
async def test_a_long_request_is_ended_once_its_first_token_is_too_old(growth):
    settings = aging(growth=growth, stream_tokens=8)
    segments, cost = await grow(MovingEngine(eos_rate=0.0), settings)
    tree = tree_of(segments, cost, settings)
    tree.check()
    assert {segments[leaf].stop for leaf in tree.leaves} == {StopReason.PRUNED}
    # looked at after 1, 9, 17 and 25 tokens, the last of which are of step 2; the other begins too old beside these
    assert tree.num_tokens_L.tolist() == [25, 1]
    assert cost.decoded_tokens == 26
    assert cost.num_pruned == 2
    assert cost.notes == ("1 leaves fewer than the width: more paths were pruned than the width",)


async def test_a_request_that_no_watch_ended_is_judged_at_its_end():
    settings = aging(stream_tokens=0)
    segments, cost = await grow(MovingEngine(eos_rate=0.0), settings)
    tree = tree_of(segments, cost, settings)
    assert tree.num_tokens_L.tolist() == [64, 64]
    assert not tree.is_whole_L.any()


@pytest.mark.parametrize("growth", ["barrier", "independent"])
@pytest.mark.parametrize(("stale", "bound"), [("true", 3), ("false", None)])
async def test_the_rule_of_age_reaches_the_tree_from_the_config(stale, bound, growth):
    shape = ("tree.width=2", "tree.first_fork_max=2", "tree.segment_tokens=8", "tree.max_depth=8")
    words = (f"prune.stale={stale}", "replay.max_staleness=3", f"tree.growth={growth}")
    config = parse([*shape, *words])
    settings = replace(_settings(config, SETTINGS.stops), stops=ENDLESS, stream_tokens=8)
    assert settings.prune.max_staleness == bound
    segments, cost = await grow(MovingEngine(eos_rate=0.0), settings)
    whole_L = tree_of(segments, cost, settings).is_whole_L
    assert whole_L.any() == (bound is None)
    # both paths, and both that took their places
    assert cost.num_pruned == (0 if bound is None else 4)


async def test_entropy_is_asked_for_only_where_forks_are_split_by_it():
    settings = ascii_settings(split="entropy")
    settings = replace(settings, sampling=replace(settings.sampling, num_top_logprobs=5))
    engine = ScriptedEngine(eos_rate=0.0)
    segments, provenance = await grow(engine, settings)
    assert len(tree_of(segments, provenance, settings).leaves) == 6
    asked = {r.max_new_tokens: r.sampling.num_top_logprobs for r in engine.requests}
    # forks may follow a segment, and none follows a path that runs to its end
    assert asked.pop(4) == 5
    assert set(asked.values()) == {0}


@pytest.mark.parametrize(("step", "temperature"), [(0, 5.0), (5, 3.0), (10, 1.0)])
def test_the_temperature_of_a_split_follows_the_policy_step(step, temperature):
    settings = replace(
        ascii_settings(split_temperature=5.0), split_temperature_end=1.0, num_steps=10
    )
    assert settings.growth_at(step).split_temperature == pytest.approx(temperature)


# ---------------------------------------------------------------- deadline


class SlowEngine(ScriptedEngine):
    """Never answers the last run of the request with the number `slow`; its others are back at once."""

    slow = 0
    num_aborted = 0

    async def extend(self, prefix, *, arrived=None, **options):
        number = len(self.requests)
        completions = await super().extend(prefix, **options)
        if number == self.slow:
            arrived.update(enumerate(completions[:-1]))
            try:
                await asyncio.Event().wait()
            finally:
                self.num_aborted += 1
        return completions


def slow_engine(request):
    engine = SlowEngine(seed=3, eos_rate=0.2)
    engine.slow = request
    return engine


@pytest.mark.parametrize(("growth", "slow"), [("barrier", 2), ("eager", 7), ("independent", 0)])
async def test_at_its_deadline_a_tree_is_closed_with_the_leaves_that_are_whole(growth, slow):
    settings = replace(ascii_settings(growth=growth), timeout_s=0.2)
    engine = slow_engine(slow)
    segments, provenance = await grow(engine, settings)
    tree = tree_of(segments, provenance, settings)
    tree.check()
    whole = int(tree.is_whole_L.sum())
    assert 1 <= whole < 6
    assert engine.num_aborted == 1
    assert f"{6 - whole} leaves fewer than the width: cut off at the deadline" in provenance.notes
    stops = {tree.segments[leaf].stop for leaf in np.array(tree.leaves)[~tree.is_whole_L]}
    assert stops <= {StopReason.PRUNED}
    assert provenance.num_pruned == 0, "no rule pruned them"


async def test_the_other_runs_of_a_request_with_a_slow_one_are_in_the_tree():
    settings = replace(ascii_settings(growth="independent"), timeout_s=0.2)
    segments, _ = await grow(slow_engine(0), settings)
    whole, _ = await grow(
        ScriptedEngine(seed=3, eos_rate=0.2), ascii_settings(growth="independent")
    )
    firsts = [s.token_ids.tolist() for s in whole if s.parent == ROOT]
    assert [s.token_ids.tolist() for s in segments if s.parent == ROOT] == firsts[:5]


async def test_a_tree_without_a_whole_leaf_at_its_deadline_is_given_up():
    settings = replace(ascii_settings(), timeout_s=0.1)
    engine = slow_engine(0)
    with pytest.raises(
        DeadlineError, match=r"waited 0\.1 s for a whole leaf of a tree; the engine"
    ):
        await grow(engine, settings)
    assert engine.num_aborted == 1


async def test_an_engines_own_deadline_is_no_deadline_of_the_tree():
    engine = ScriptedEngine(failures={0: DeadlineError("the gate", "engine host", 5)})
    with pytest.raises(DeadlineError, match="waited 5 s for the gate"):
        await grow(engine, replace(ascii_settings(), timeout_s=60))


async def test_a_tree_that_is_in_time_does_not_depend_on_the_deadline():
    free, bound = [
        await grow(ScriptedEngine(seed=5), replace(ascii_settings(), timeout_s=timeout_s))
        for timeout_s in (math.inf, 60.0)
    ]
    assert [s.token_ids.tolist() for s in free[0]] == [s.token_ids.tolist() for s in bound[0]]
    assert bound[1].notes == free[1].notes
