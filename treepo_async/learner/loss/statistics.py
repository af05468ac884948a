"""What is summed over the trained tokens of an update: totals, and the same few columns by lag and by grid level.

Neighbours: `objective` fills the vector, `step` adds it up over microbatches and ranks, `result` reads it. Every number is a sum,
so parts of a batch add up exactly.

A token counts once per trajectory of its piece through it, unless said otherwise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from treepo_async.learner.packing.edges import UNKNOWN_LAG, Edges

LAGS = (*map(str, range(8)), "8+", "unknown")
LEVELS = (*map(str, range(16)), "16+")
ROWS = (*(f"lag/{row}" for row in LAGS), *(f"level/{row}" for row in LEVELS))
"""Every token is in one row of each."""

COLUMNS = ("tokens", "weight", "weight_square", "kl_behavior", "clipped", "masked")
"""Summed for every row; the weight is that of correction and mask together."""

TOTALS = (
    "loss", "policy_loss", "capped", "entropy", "kl_reference", "referenced", "trajectory_tokens",
    "gap", "compared", "trained_tokens", "microbatches",
)  # fmt: skip
"""The two losses count what they count in the update; gaps and trained tokens count each token once; a microbatch without trained
tokens does not count as one."""

SUMS = (*TOTALS, *(f"{row}/{column}" for row in ROWS for column in COLUMNS))
"""The names of the vector."""


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """Numbers of each trained token, [E] each."""

    weight: Tensor
    kl_behavior: Tensor
    clipped: Tensor
    masked: Tensor
    capped: Tensor
    entropy: Tensor
    kl_reference: Tensor | None
    gap: Tensor
    """Read where the token is fresh."""


def sums_of(
    edges: Edges, loss: Tensor, policy_loss: Tensor, tokens: TokenStatistics
) -> tuple[Tensor, Tensor]:
    """The sums named by `SUMS`, float64 `[S]`, and the largest gap of a fresh token, float64 `[]`."""
    count = edges.count.double()

    def total(values: Tensor | None) -> Tensor:
        return count.new_zeros(()) if values is None else (count * values).sum()

    gap = torch.where(edges.is_fresh, tokens.gap, 0.0).double()
    referenced = None if tokens.kl_reference is None else torch.ones_like(count)
    num_trained = count.new_tensor(len(count))
    totals = [
        loss.double(),
        policy_loss.double(),
        total(tokens.capped),
        total(tokens.entropy),
        total(tokens.kl_reference),
        total(referenced),
        count.sum(),
        gap.sum(),
        edges.is_fresh.sum().double(),
        num_trained,
        (num_trained > 0).double(),
    ]
    sums = torch.cat([torch.stack(totals), _table(edges, count, tokens)])
    return sums, torch.cat([gap.new_zeros(1), gap]).max()


def _table(edges: Edges, count: Tensor, tokens: TokenStatistics) -> Tensor:
    """The columns of every row, flat."""
    columns = (
        torch.ones_like(count),
        tokens.weight,
        tokens.weight.double() ** 2,
        tokens.kl_behavior,
        tokens.clipped,
        tokens.masked,
    )
    columns_EC = torch.stack([count * column for column in columns], dim=1)
    table_RC = count.new_zeros(len(ROWS), len(COLUMNS))
    return (
        table_RC.index_add(0, _lag_row(edges), columns_EC)
        .index_add(0, len(LAGS) + edges.level.clamp(max=len(LEVELS) - 1), columns_EC)
        .flatten()
    )


def _lag_row(edges: Edges) -> Tensor:
    oldest, unknown = len(LAGS) - 2, len(LAGS) - 1
    return torch.where(edges.lag == UNKNOWN_LAG, unknown, edges.lag.clamp(max=oldest))
