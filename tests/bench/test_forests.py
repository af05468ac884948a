"""Made forests are forests, and of the shape that was asked for."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treepo_async.bench.forests import random_end, regular_end
from treepo_async.learner.attention.paths import divide


@given(st.integers(0, 2**32 - 1), st.integers(0, 200), st.integers(1, 60))
def test_a_random_forest_is_one_and_has_the_tokens(seed, num_tokens, longest):
    end = random_end(np.random.default_rng(seed), num_tokens, longest=longest)
    assert (len(end), end.dtype) == (num_tokens, np.int32)
    divide(end.astype(np.int64))  # refuses what is no forest


def test_a_tree_forks_at_its_levels():
    # 1 prompt token, level 0 and, forked, level 1 with 2 tokens each
    end = regular_end(prompt=1, segment=2, depth=2, forks=(1,))
    assert end.tolist() == [7, 7, 7, 5, 5, 7, 7]


def test_a_tree_without_forks_is_a_chain():
    assert set(regular_end(prompt=3, segment=2, depth=4, forks=()).tolist()) == {11}
