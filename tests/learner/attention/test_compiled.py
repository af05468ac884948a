"""What a limit on compilations does, with torch's tracing alone: no compiler is needed."""

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from treepo_async.learner.attention.compiled import compiled

KINDS = [
    torch.zeros((2,) * rank, dtype=dtype)
    for rank in range(1, 6)
    for dtype in (torch.float32, torch.float64)
]
"""Ten: each needs a compilation of its own, and torch's limit is 8."""


def doubled(tensor):
    return tensor * 2


def test_a_function_is_compiled_for_as_many_kinds_of_arguments_as_are_allowed():
    call = compiled(doubled, most=len(KINDS), backend="eager")
    assert [call(kind).dtype for kind in KINDS] == [kind.dtype for kind in KINDS]


def test_beyond_the_limit_a_call_fails_and_does_not_compute_uncompiled():
    def tripled(tensor):
        return tensor * 3

    call = compiled(tripled, most=2, backend="eager")
    for kind in KINDS[:2]:
        call(kind)
    with pytest.raises(FailOnRecompileLimitHit):
        call(KINDS[2])


def test_the_limit_of_a_function_is_not_left_to_others():
    compiled(doubled, most=3, backend="eager")(KINDS[0])
    assert torch._dynamo.config.recompile_limit > 3
