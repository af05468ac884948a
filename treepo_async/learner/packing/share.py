"""What one data-parallel replica trains of a batch.

Neighbours: `divide` makes shares on rank 0, `share_codec` and `control` carry each replica its own, `step` lays it out and trains it.
"""

from dataclasses import dataclass, field

from treepo_async.errors import TreeError
from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.geometry import Float64
from treepo_async.learner.packing.piece import Piece
from treepo_async.types import Float32, Tree

SegmentValues = tuple[Float32, ...]
"""One number for each token of a tree, per segment `[T]`; NaN where nobody computed it."""


@dataclass(frozen=True, slots=True)
class Share:
    """Trees, what their trajectories count for, and the microbatches they are trained in.

    Of a whole update before it is divided, of one replica afterwards.
    """

    trees: tuple[Tree, ...]
    advantages: tuple[Float64, ...]
    """Per tree [L] or [L, D]."""
    weights: tuple[Float64, ...]
    """Per tree [L] or [L, D], divided by the normalizer of the batch."""
    microbatches: tuple[tuple[Piece, ...], ...] = ()
    """A piece's `tree` is an index into `trees`; an empty microbatch trains nothing."""
    proximal: tuple[SegmentValues, ...] | None = None
    """Per tree, log-probs under the weights at the start of the batch; None: not computed."""
    reference: tuple[SegmentValues, ...] | None = None
    """Per tree, log-probs under the reference policy; None: not computed."""
    bounds: Bounds = field(default_factory=Bounds)

    def __post_init__(self) -> None:
        for name in ("advantages", "weights"):
            if len(getattr(self, name)) != len(self.trees):
                raise TreeError(
                    f"{len(self.trees)} trees have {len(getattr(self, name))} rows of {name}"
                )
