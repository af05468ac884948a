"""What the queue decides by."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class QueueRules:
    """The knobs of the queue."""

    prompts_per_batch: int
    max_staleness: int
    num_batches: int
    """Batches of the whole run: no prompt is leased beyond them."""
    lease_timeout_s: float
    max_attempts: int
    drop_degenerate: bool
    max_refills: int
    """Degenerate trees replaced for one batch; beyond it they are trained as they are."""
