"""Tile lists against all pairs, and against the block mask that PyTorch makes of all pairs."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from tests.learner.forests import visible
from treepo_async.bench.forests import random_end
from treepo_async.learner.attention.flex import TILE, block_mask
from treepo_async.learner.attention.tiles import classify, listed

SEEDS = st.integers(0, 2**32 - 1)
LISTS = ("kv", "full_kv", "q", "full_q")


@given(SEEDS, st.integers(1, 7), st.integers(1, 9))
def test_tiles_are_full_and_mixed_exactly_where_all_and_some_pairs_are_visible(seed, size, number):
    rng = np.random.default_rng(seed)
    end = random_end(rng, size * number, longest=int(rng.integers(1, 2 * size + 2)))
    tiles = visible(end).reshape(number, size, number, size)
    some, every = tiles.any(axis=(1, 3)), tiles.all(axis=(1, 3))
    mixed, full = classify(torch.from_numpy(end), size)
    np.testing.assert_array_equal(full.numpy(), every)
    np.testing.assert_array_equal(mixed.numpy(), some & ~every)


def test_a_list_has_the_chosen_columns_first_and_in_order():
    number, order = listed(torch.tensor([[False, True, False, True], [False] * 4]))
    assert number.tolist() == [2, 0]
    assert order.tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    assert number.dtype == order.dtype == torch.int32


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_block_mask_is_the_one_pytorch_makes_of_all_pairs(seed):
    rng = np.random.default_rng(seed)
    end = torch.from_numpy(random_end(rng, TILE * int(rng.integers(1, 7)), longest=100))
    ours = block_mask(end)
    theirs = create_block_mask(ours.mask_mod, None, None, len(end), len(end), device="cpu")
    assert ours.shape == theirs.shape
    for name in LISTS:
        numbers = getattr(theirs, f"{name}_num_blocks")
        assert torch.equal(getattr(ours, f"{name}_num_blocks"), numbers)
        for row, number in enumerate(numbers.flatten().tolist()):
            mine, other = (
                getattr(x, f"{name}_indices")[0, 0, row, :number] for x in (ours, theirs)
            )
            assert torch.equal(mine, other)


def test_the_block_mask_holds_nothing_of_the_size_of_all_pairs():
    num_tokens = 64 * TILE
    made = block_mask(torch.full((num_tokens,), num_tokens, dtype=torch.int32))
    held = [part for part in made.as_tuple() if isinstance(part, torch.Tensor)]
    assert held
    assert max(part.numel() for part in held) == 64 * 64
