"""The two policies that the current one is compared with: the proximal one, and the one that sampled.

Neighbours: `objective` calls it; `correction`, `mask` and `loss` read the log-ratios made of it. Pure torch.

Proximal log-probs p, the centre of the clip range, with mu the behavior and theta the current log-probs:

    current        theta, without a gradient: the weights did not change since the batch began
    recomputed     those of a forward pass at the start of the batch
    interpolated   mu + a (theta - mu), a = lag / (lag + 1)     A-3PO (2025), log-linear, by the lag of the token itself

Tokens of no known lag (trees from a file) are taken for infinitely old by `interpolated`: a = 1, which is `current`.

Fresh tokens: mu and p are the same policy there and differ by the rounding of two programs alone. Unless they are to be corrected
too, mu is read as p: log-ratios are then exactly 0, weights exactly 1, and nothing is masked.
"""

import torch
from torch import Tensor

from treepo_async.learner.packing.edges import UNKNOWN_LAG, Edges


def proximal_logprobs(name: str, edges: Edges, theta: Tensor) -> Tensor:
    """The centre of the clip range, [E], without a gradient.

    Args:
        name: in `config.schema.PROXIMALS`; `auto`: recomputed where that was done, else current.
        edges: of the microbatch.
        theta: [E], current log-probs.

    Raises:
        ValueError: they should have been recomputed and were not.
    """
    theta = theta.detach()
    if name == "interpolated":
        return _interpolated(edges, theta)
    if name == "current":
        return theta
    if edges.proximal_logprobs is not None:
        return edges.proximal_logprobs
    if name == "recomputed":
        raise ValueError("proximal=recomputed needs the log-probs at the start of the batch")
    return theta


def behavior_logprobs(edges: Edges, proximal: Tensor, *, correct_fresh: bool) -> Tensor:
    """Log-probs of the policy that sampled, [E], read as the proximal ones for fresh tokens unless `correct_fresh`."""
    if correct_fresh:
        return edges.behavior_logprobs
    return torch.where(edges.is_fresh, proximal, edges.behavior_logprobs)


def _interpolated(edges: Edges, theta: Tensor) -> Tensor:
    mu, lag = edges.behavior_logprobs, edges.lag.to(theta.dtype)
    share = torch.where(edges.lag == UNKNOWN_LAG, 1.0, lag / (lag + 1))
    return mu + share * (theta - mu)
