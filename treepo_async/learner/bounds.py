"""What some masks must know about the whole batch before any microbatch of it is computed.

Made on rank 0 from the proximal log-probs of all trees and told to every rank, so that a mask does not depend on how the batch is
divided. Neighbours: `mask` reads them, `share` carries them, `team` has them made.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """Numbers of a batch; the defaults mask nothing."""

    log_ratio_std: float = math.nan
    """Standard deviation of proximal - behavior log-probs over trained tokens, in nats."""
    largest_square: float = math.inf
    """Tokens whose squared log-ratio is above it are masked by `m2po`."""
