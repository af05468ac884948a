from dataclasses import replace

import numpy as np
import pytest

from tests.oracle import random_tree
from treepo_async.actor.tally import Tally, duration
from treepo_async.scoring.failures import Failure
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def tree_with(**costs):
    tree = random_tree(np.random.default_rng(3), num_segments=8)
    return replace(tree, provenance=Provenance("l", "a", **costs))


def forked(parents, lengths, **costs):
    """A tree of segments of at most 4 tokens, with their parents and lengths."""
    leaves = {i for i in range(len(parents)) if i not in parents}
    segments = tuple(
        Segment(
            parent,
            0 if parent == ROOT else 1,
            np.ones(length, np.int32),
            np.full(length, -0.5, np.float32),
            PolicyVersion(0, 0),
            StopReason.EOS if i in leaves else None,
        )
        for i, (parent, length) in enumerate(zip(parents, lengths, strict=True))
    )
    scores = np.ones(len(leaves), np.float32)
    prompt = Prompt("p", np.ones(2, np.int32), "", "")
    sampling = Sampling(1.0, 4, 2, width=len(leaves), branching_factor=2)
    tree = Tree(prompt, segments, scores, scores, sampling, Provenance("l", "a", **costs))
    tree.check()
    return tree


@pytest.fixture
def clock():
    return Clock()


def test_progress_says_how_fast_and_how_long(clock):
    tally = Tally(20, clock, done=2, skipped=1)
    for _ in range(4):
        clock.seconds += 0.5
        tally.add(tree_with(decoded_tokens=50, cached_tokens=90, prefix_tokens=100))
    line = tally.line()
    assert line.startswith("7/20 prompts  2.00 trees/s  decoded 100 tokens/s")
    delivered = tree_with().num_delivered_tokens
    assert f"delivered {2 * delivered} tokens/s  cached 90%  left 7 s" in line
    assert line.endswith("skipped 1  failed 0  errors 0")


def test_before_the_first_tree_nothing_is_promised(clock):
    clock.seconds += 5
    assert "left -" in Tally(3, clock).line()


def test_rates_are_those_of_lately(clock):
    tally = Tally(1000, clock)
    for _ in range(100):
        clock.seconds += 1
        tally.add(tree_with())
        tally.line()
    for _ in range(300):
        clock.seconds += 1
        line = tally.line()
    assert " 0.00 trees/s" in line
    assert "left -" in line


def test_time_before_growing_does_not_count(clock):
    tally = Tally(3, clock)
    clock.seconds += 1000
    tally.begin()
    clock.seconds += 2
    tally.add(tree_with())
    assert "0.50 trees/s" in tally.line()
    tally.end()
    clock.seconds += 1000
    assert any("2 s, 0.50 trees/s" in line for line in tally.summary())


def test_the_summary_counts_what_was_delivered_and_what_was_pruned(clock):
    tree = tree_with(decoded_tokens=40, wasted_tokens=3, cached_tokens=9, prefix_tokens=10)
    first, *others = tree.leaves
    segments = list(tree.segments)
    segments[first] = replace(segments[first], stop=StopReason.PRUNED)
    rewards = np.array([np.nan, np.nan, *([1.0] * (len(others) - 1))], np.float32)
    tree = replace(tree, segments=tuple(segments), rewards_L=rewards, accuracies_L=rewards)
    tally = Tally(5, clock, failed=1)
    tally.add(tree)
    tally.failures = {Failure.RAISED: 1}
    clock.seconds += 1
    text = dict(line.split(None, 1) for line in tally.summary())
    assert text["prompts"] == "1 done, 0 skipped, 1 failed of 5"
    delivered = tree.num_delivered_tokens
    assert text["tokens"].startswith(f"40 decoded / {delivered} delivered = ")
    assert text["tokens"].endswith(", 3 cut off")
    assert text["length"].startswith(f"{delivered / len(others):.1f} tokens")
    assert text["reward"] == "mean +1.000, accuracy 1.000, errors 1 (raised 1)"
    assert text["pruned"] == "1"
    assert text["cache"] == "90% of prefix tokens"


def rows_of(*trees, clock):
    tally = Tally(len(trees), clock)
    for tree in trees:
        tally.add(tree)
    return dict(line.split(None, 1) for line in tally.summary())


def test_the_summary_tells_how_much_longer_trees_are_than_independent_samples(clock):
    # a path of 2 tokens ends; the other one, of 4, forks into two that go on with 4 more
    early = forked([ROOT, ROOT, 1, 1], [2, 4, 4, 4])
    # lengths 2, 8, 8 with weights 1/2, 1/4, 1/4
    assert rows_of(early, clock=clock)["length"] == (
        "6.0 tokens of a trajectory, mean; unbiased 5.0, trees make it +20%"
    )
    # two more, of 4 and 2 with 1/2 each: 24 tokens of 5, and weighted 5 + 3 of 2 trees
    flat = forked([ROOT, ROOT], [4, 2])
    assert rows_of(early, flat, clock=clock)["length"] == (
        "4.8 tokens of a trajectory, mean; unbiased 4.0, trees make it +20%"
    )


def test_where_nothing_was_saved_and_lengths_have_no_bias_the_summary_says_nothing_of_it(clock):
    rows = rows_of(forked([ROOT, ROOT], [4, 2]), clock=clock)
    assert rows["length"] == "3.0 tokens of a trajectory, mean"
    assert "saved" not in rows


def test_the_summary_adds_up_the_tokens_that_paths_cut_short_did_not_cost(clock):
    trees = [forked([ROOT], [3], saved_tokens=saved) for saved in (5, 0, 7)]
    assert rows_of(*trees, clock=clock)["saved"] == (
        "12 tokens by pruning and repetition stops, estimated"
    )


def test_a_start_whose_paths_were_all_pruned_has_no_length(clock):
    tree = forked([ROOT], [3])
    pruned = replace(tree, segments=(replace(tree.segments[0], stop=StopReason.PRUNED),))
    assert rows_of(pruned, clock=clock)["length"] == "-"


def test_the_summary_of_a_start_that_did_nothing_is_short(clock):
    assert len(Tally(5, clock, done=5).summary()) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (7.2, "8 s"), (59.9, "1 min 0 s"), (185, "3 min 5 s"), (7290, "2 h 1 min")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
