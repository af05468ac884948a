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
    """Without a word of its actor."""
    max_attempts: int
    drop_degenerate: bool
    max_refills: int
    """Degenerate trees replaced for one batch; beyond it they are trained as they are."""
    lease_limit_s: float = 1200.0
    """For a lease, whatever its actor says."""
    regrow: bool = False
    """Whether a tree that is too old for its batch goes out with its lease, for what of it can be kept."""
