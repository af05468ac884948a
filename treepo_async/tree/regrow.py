"""What of a tree that is too old for its batch can be kept, so that only the rest of it is grown again. Pure.

The rule: a segment stays if it continues one that stays (or the prompt), was sampled at the least policy step or later, and
under the newest lineage that the tree has: what an earlier lineage sampled is of weights that were rolled back. A path is
older at its beginning than at its end, so what stays is mostly whole subtrees: the branches that began late enough.

Paths that had ended by themselves stay ended. Those that were cut short, by a pruning rule or at the tree's deadline, may go
on, as may those of which only the first segments stay. `growth` decides which do, and fills the width up by its own rules.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from treepo_async.tree.rules import GrowthRules
from treepo_async.types import ROOT, Prompt, Sampling, Segment, StopReason, Tree, leaves_of


@dataclass(frozen=True, slots=True)
class Trunk:
    """What a tree begins with, of an earlier one of its prompt; by default nothing."""

    segments: tuple[Segment, ...] = ()
    """In creation order; a leaf without a stop is open: it may be continued."""
    num_before: int = 0
    """Tokens of the earlier tree; 0: there was none."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a tree says of it."""
        num_kept = sum(map(len, self.segments))
        text = f"regrown: {num_kept} of {self.num_before} tokens kept"
        return (text,) if self.num_before else ()


def trunk_of(
    tree: Tree, prompt: Prompt, sampling: Sampling, rules: GrowthRules, least_step: int
) -> Trunk:
    """What stays of a tree; nothing where it was grown from another prompt, or otherwise than trees are grown here.

    Args:
        tree: the earlier one.
        prompt: that is to have a tree.
        sampling: how it will be sampled.
        rules: by which it will grow.
        least_step: oldest policy step that a segment may come from.
    """
    is_same = np.array_equal(tree.prompt.token_ids, prompt.token_ids) and tree.sampling == sampling
    kept = kept_trunk(tree.segments, least_step) if is_same else ()
    return Trunk(kept if fits(kept, rules) else (), tree.num_tokens)


def kept_trunk(segments: Sequence[Segment], least_step: int) -> tuple[Segment, ...]:
    """The segments that stay, by the rule of the module; those that were cut short have no stop any more.

    Args:
        segments: of the earlier tree, [S].
        least_step: oldest policy step that stays.

    Returns:
        At most S segments in the same order, closed under parents.
    """
    lineage = max((s.policy_version.lineage for s in segments), default=0)
    index, kept = {ROOT: ROOT}, list[Segment]()
    for i, segment in enumerate(segments):
        version = segment.policy_version
        if segment.parent in index and version.step >= least_step and version.lineage == lineage:
            index[i] = len(kept)
            stop = None if segment.stop is StopReason.PRUNED else segment.stop
            kept.append(replace(segment, parent=index[segment.parent], stop=stop))
    return tuple(kept)


def fits(trunk: tuple[Segment, ...], rules: GrowthRules) -> bool:
    """Whether a tree of these rules can begin so: on its grid, within its limit and its width."""
    ends: list[int] = []
    for segment in trunk:
        start = 0 if segment.parent == ROOT else ends[segment.parent]
        ends.append(start + len(segment))
        if (
            not start // rules.segment_tokens
            == segment.level
            == (ends[-1] - 1) // rules.segment_tokens
        ):
            return False
    leaves = leaves_of(trunk)
    num_ended = sum(trunk[i].stop is not None for i in leaves)
    return num_ended <= rules.width and all(_may_end(trunk[i], ends[i], rules) for i in leaves)


def _may_end(leaf: Segment, end: int, rules: GrowthRules) -> bool:
    """Whether a path may end, or be open, after `end` tokens."""
    if leaf.stop in (StopReason.LENGTH, StopReason.DEPTH):
        return end == rules.limit and leaf.stop is rules.limit_reason
    return end < rules.limit or (end == rules.limit and leaf.stop is not None)
