"""Off-policy corrections: what a token sampled under other weights or another kernel counts for.

A correction maps the proximal and the behavior log-probs of a token to a detached weight on its loss. Neighbours:
`loss` multiplies by it, `step` finds it by name. Pure.

Invariant: no gradient flows through a weight.
"""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import MappingProxyType

import torch
from torch import Tensor

from treepo_async.errors import ConfigError

Correction = Callable[[Tensor, Tensor, float], Tensor]
"""(proximal_logprobs [E], behavior_logprobs [E], cap) -> weight [E]."""


def truncated(proximal_logprobs: Tensor, behavior_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """Truncated importance sampling, `min(exp(proximal - behavior), cap)`.

    Ionides, "Truncated importance sampling", 2008; per token as in IMPALA's rho-bar (Espeholt et al., 2018, section 4.1).

    Args:
        proximal_logprobs: [E], log-probs the trust region is centred on.
        behavior_logprobs: [E], log-probs of the policy that sampled.
        cap: largest weight.

    Returns:
        Weights `[E]` in (0, cap], detached.
    """
    return torch.exp(proximal_logprobs - behavior_logprobs).clamp(max=cap).detach()


def none(proximal_logprobs: Tensor, behavior_logprobs: Tensor, cap: float = 2.0) -> Tensor:
    """No correction: every token counts for 1, whatever the policy that sampled it."""
    return torch.ones_like(proximal_logprobs)


CORRECTIONS: Mapping[str, Correction] = MappingProxyType({"truncated": truncated, "none": none})


def find_correction(name: str) -> Correction:
    """Look a correction up by name.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    if name in CORRECTIONS:
        return CORRECTIONS[name]
    near = get_close_matches(name, CORRECTIONS, n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"correction {name!r} is unknown{hint}; there are: {', '.join(CORRECTIONS)}")
