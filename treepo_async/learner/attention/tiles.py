"""Which tiles of a forest's attention mask are empty, full or mixed, from `end` alone.

A tile is `size` queries by `size` keys. Time and memory are O(T + tiles); no pair of tokens is looked at. Neighbour:
`flex`, whose kernel skips empty tiles and masks mixed ones.

Both rules are exact. Rows `[r0, r1)` and columns `[c0, c1)` of a tile; row `q` sees column `k` when `k <= q < end[k]`.
* Empty when `c0 >= r1` (all keys come later) or `r0 >= max end` (all keys have closed). Else a pair is visible: if the columns
  reach into the rows, a token that sees itself; if they all come before the rows, row `r0` sees the column that closes last.
* Full when `c1 <= r0 + 1` (no key comes later) and `r1 <= min end` (none closes before the last row). Else the pair (r0, c1 - 1) is
  causally masked, or the last row misses the column that closes first.
"""

import torch
from torch import Tensor


def classify(end: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The mixed and the full tiles, bool [T / size, T / size] each, on the device of `end` and without waiting for it.

    Args:
        end: int [T], T a multiple of `size`.
        size: of a tile's sides.
    """
    by_tile = end.view(-1, size)
    last, first = by_tile.amax(dim=1)[None, :], by_tile.amin(dim=1)[None, :]
    begin = torch.arange(len(by_tile), device=end.device) * size
    row, column = begin[:, None], begin[None, :]
    empty = (column >= row + size) | (row >= last)
    full = (column + size <= row + 1) & (row + size <= first)
    return ~(empty | full), full


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen columns of each row, as kernels want them.

    Args:
        chosen: bool [rows, columns].

    Returns:
        int32 [rows], how many; int32 [rows, columns], those in ascending order, then the others.
    """
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return chosen.sum(dim=1, dtype=torch.int32), order.to(torch.int32)
