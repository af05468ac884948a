"""The steps of the CPU backend against the definition of a path."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.learner.forests import visible
from treepo_async.bench.forests import random_end
from treepo_async.errors import TreeError
from treepo_async.learner.attention.paths import divide

SEEDS = st.integers(0, 2**32 - 1)
BLOCKS = st.integers(1, 20)


def forest(seed, most=90):
    rng = np.random.default_rng(seed)
    return random_end(rng, int(rng.integers(1, most)), longest=int(rng.integers(1, 12)))


def written(stack, writes):
    for height, start, stop in writes:
        stack = [*stack[:height], *range(start, stop), *stack[height + stop - start :]]
    return stack


def pairs_of(step, stack):
    """(query, key) that a step computes and does not mask."""
    keys = stack[: step.num_keys]
    top = step.num_mixed + step.num_own
    mask = np.tri(step.num_own, dtype=bool) if step.mask is None else step.mask
    assert mask.shape == (step.num_own, top)
    sees = np.concatenate([np.ones((step.num_own, len(keys) - top), bool), mask], axis=1)
    return {(step.start + q, keys[k]) for q, k in np.argwhere(sees).tolist()}


@given(SEEDS, BLOCKS)
def test_the_steps_and_the_lone_tokens_are_the_mask_pair_by_pair(seed, block):
    end = forest(seed)
    found, stack = set(), []
    forest_steps = divide(end.astype(np.int64), block)
    for step in forest_steps.steps:
        stack = written(stack, step.pushes)
        found |= pairs_of(step, stack)
    found |= {(k, k) for start, stop in forest_steps.lone for k in range(start, stop)}
    assert found == set(map(tuple, np.argwhere(visible(end)).tolist()))


@given(SEEDS, BLOCKS)
def test_going_back_makes_the_stacks_that_going_on_made(seed, block):
    steps = divide(forest(seed).astype(np.int64), block).steps
    stack, made = [], []
    for step in steps:
        stack = written(stack, step.pushes)
        made.append(stack[: step.num_keys])
    stack = []
    for step, keys in zip(reversed(steps), reversed(made), strict=True):
        stack = written(stack, step.returns)
        assert stack[: step.num_keys] == keys


@given(SEEDS, BLOCKS)
def test_masks_calls_and_copies_are_linear_in_the_tokens(seed, block):
    end = forest(seed)
    steps, num_tokens = divide(end.astype(np.int64), block).steps, len(end)
    assert all(step.num_own <= block and step.num_mixed <= block for step in steps)
    for copies in ([s.pushes for s in steps], [s.returns for s in steps]):
        assert sum(stop - start for writes in copies for _, start, stop in writes) <= 2 * num_tokens
    lone_cuts = len(divide(end.astype(np.int64), block).lone)
    assert len(steps) <= 2 * num_tokens / block + lone_cuts + 1


def test_padding_is_in_no_step():
    end = np.array([3, 3, 3, 4, 5, 6], np.int64)
    found = divide(end)
    assert found.lone == ((3, 6),)
    assert [(step.start, step.stop) for step in found.steps] == [(0, 3)]
    assert divide(np.arange(1, 9)).steps == ()


def test_a_chain_is_one_run_however_many_segments_it_has():
    (step,) = divide(np.full(12, 12)).steps
    assert (step.num_path, step.mask) == (0, None)


def test_no_tokens_are_no_steps():
    assert divide(np.zeros(0, np.int64)).steps == ()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ([2, 1, 3], "end is 1 for the tokens 1 to 1; it must lie from 2 to 2"),
        ([4, 4, 4], "end is 4 for the tokens 0 to 2; it must lie from 3 to 3"),
        ([2, 3, 3], "end is 3 for the tokens 1 to 2; it must lie from 3 to 2"),
        ([0, 2, 3], "end is 0 for the tokens 0 to 0; it must lie from 1 to 3"),
    ],
)
def test_what_is_no_forest_is_refused(end, message):
    with pytest.raises(TreeError, match=message):
        divide(np.array(end, np.int64))
