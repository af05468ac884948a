"""The peak of a process, counted by the kernel and watched by a thread."""

from pathlib import Path

import pytest
import torch

from treepo_async.bench.peak import CLEAR, peak_bytes

LARGE = 2**27
"""Bytes of the tensor that the work makes."""


def takes_much():
    """Long enough to be seen, and freed at its end."""
    large = torch.zeros(LARGE, dtype=torch.uint8)
    for _ in range(5):
        large += 1


def takes_little():
    """Nothing that is worth counting."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the allocator counts")
@pytest.mark.parametrize("clear", [CLEAR, Path("/nowhere/clear_refs")], ids=["kernel", "watched"])
def test_what_work_takes_is_seen_though_it_is_freed_and_though_more_was_taken_before(clear):
    for _ in range(2):
        found = peak_bytes(takes_much, clear=clear)
        assert 0.9 * LARGE < found < 1.5 * LARGE
    assert peak_bytes(takes_little, clear=clear) < LARGE // 10
