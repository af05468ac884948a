"""The knobs of a tree: its shape, and which paths are pruned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from treepo_async.types import Float32, Int32, StopReason


@dataclass(frozen=True, slots=True)
class GrowthRules:
    """The knobs of a tree's shape."""

    segment_tokens: int
    max_depth: int
    width: int
    branching_factor: int
    first_fork_min: int
    first_fork_max: int
    fallback: str
    """random, low_confidence, from_start or none, see `fallback`."""
    max_response_tokens: int | None = None
    growth: str = "barrier"
    """barrier, eager or independent, see `growth`."""
    split: str = "even"
    """even, logprob_high, logprob_low or entropy, see `split`."""
    split_temperature: float = 2.0
    max_tree_tokens: int | None = None
    """Most decoded tokens; a single path may always run to its limit."""

    @property
    def limit(self) -> int:
        """Most response tokens of a path."""
        by_depth = self.segment_tokens * self.max_depth
        return (
            by_depth
            if self.max_response_tokens is None
            else min(by_depth, self.max_response_tokens)
        )

    @property
    def limit_reason(self) -> StopReason:
        """Why a path ends that reaches the limit."""
        wanted = self.max_response_tokens or self.limit
        return StopReason.LENGTH if wanted <= self.limit else StopReason.DEPTH


@dataclass(frozen=True, slots=True)
class PartialPath:
    """A path that is not complete, as pruning sees it."""

    token_ids: Int32
    """[T], of the response so far."""
    behavior_logprobs: Float32
    """[T]"""


Value = Callable[[PartialPath, Sequence[PartialPath]], float]
"""From a path and all paths of its tree, itself included, to its value; NaN where it has none."""


@dataclass(frozen=True, slots=True)
class PruneRules:
    """Which paths end at a boundary although they could go on; none by default."""

    min_logprob: float | None = None
    """Least mean log-prob of a path's last level."""
    value: Value | None = None
    min_value: float = 0.0
    """Least value."""
    first_level: int = 0
    """The first two rules begin at the end of this level."""
    probability: float = 1.0
    """With which a path that falls under the first two rules is pruned."""
    max_staleness: int | None = None
    """Most publications between a path's oldest token and the newest of its tree. Paths that are older are always pruned,
    the whole ones too."""
    refill: bool = True
    """Whether another path takes the place of a pruned one; of no more than `width`."""

    @property
    def judges(self) -> bool:
        """Whether paths have to be looked at at every boundary; age is seen at the end of a run, or while it lasts."""
        return self.min_logprob is not None or self.value is not None
