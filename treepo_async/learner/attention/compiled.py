"""A function compiled by `torch.compile`, with a limit of its own on how often one process compiles it.

Torch's own limit, 8, is for functions that meet few kinds of arguments, and is one for the whole process; its keyword for a limit of one
function is not in every version of torch that runs this. Neighbour: `flex` compiles its kernel here.

Invariant: beyond the limit a call raises torch's `FailOnRecompileLimitHit`; it never computes without compilation.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch._dynamo.config as dynamo_config


def compiled(
    function: Callable[..., Any], *, most: int, backend: str = "inductor"
) -> Callable[..., Any]:
    """Compile a function when it is called.

    Args:
        function: of tensors, without a break of its graph.
        most: how many kinds of arguments it may be compiled for.
        backend: of `torch.compile`.
    """
    inner = torch.compile(function, fullgraph=True, backend=backend)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # the limit is read while a call compiles, so it need not stand between calls
        with dynamo_config.patch(recompile_limit=most):
            return inner(*args, **kwargs)

    return call
