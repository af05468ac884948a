"""The nouns of the system, frozen: what every process means by a prompt, a segment, a tree.

Axis letters: `P` prompt tokens, `S` segments, `L` leaves, `T` tokens. A tree is written once, by the actor
that grew it, and read by everybody else; nothing here does I/O or imports anything heavier than numpy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import TreeError

ROOT = -1
"""Parent index of a segment that hangs on the prompt itself."""

LOGPROB_SLACK = 1e-4
"""How far rounding may lift a log-prob above 0."""

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class PolicyVersion(NamedTuple):
    """A set of weights: `step` publications into lineage `lineage`; a rollback starts a new lineage."""

    lineage: int
    step: int

    def __str__(self) -> str:
        return f"{self.lineage}.{self.step}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote.

        Raises:
            ValueError: `text` is not `<lineage>.<step>`.
        """
        lineage, dot, step = text.partition(".")
        if not (dot and lineage.isdigit() and step.isdigit()):
            raise ValueError(f"policy version {text!r} is not <lineage>.<step>, e.g. 0.12")
        return cls(int(lineage), int(step))


LEAST_CHANCE = 1e-300
"""Of a path to be let go on: its inverse is a weight, which is to be finite."""
NO_LINEAGE = 2**31 - 1
"""Lineage of the weights of no run: that of trees that come from a file."""


class StopReason(StrEnum):
    """Why a path ended. A segment that was continued has no stop reason."""

    EOS = "eos"
    """The end-of-sequence token; it is the last token of the segment."""
    BOXED = "boxed"
    """A complete `\\boxed{...}`."""
    LENGTH = "length"
    """The response limit, `segment_tokens * max_depth` tokens."""
    DEPTH = "depth"
    """The last level, before the response limit (only where a segment may be short)."""
    REPETITION = "repetition"
    """The text repeats itself."""
    PRUNED = "pruned"
    """Ended early by a pruning rule; it is never scored."""
    ABORT = "abort"
    """Ended by the engine or by a shutdown; never trained."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem: the tokens the engine is fed and the key its answer is checked against."""

    id: str
    token_ids: Int32
    """[P], at least one token."""
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens of one grid level sampled under one policy version."""

    parent: int
    """Index of the segment it continues, `ROOT` for the prompt; always below its own index."""
    level: int
    """Grid index: tokens between prompt and segment, divided by the segment length."""
    token_ids: Int32
    """[T], at least one token."""
    behavior_logprobs: Float32
    """[T], log-probs of `token_ids` under the policy and temperature that sampled them."""
    policy_version: PolicyVersion
    stop: StopReason | None = None
    """Why the path ended here; None where it was continued."""
    mixed_context: bool = False
    """Whether part of its KV cache was computed under older weights."""
    inclusion: float = 1.0
    """Probability with which pruning let the path go on behind this segment, in (0, 1]."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a tree was sampled: what the learner must know to recompute its log-probs and levels."""

    temperature: float
    segment_tokens: int
    max_depth: int
    width: int
    branching_factor: int
    growth: str = "barrier"
    """How it grew: barrier, eager or independent, see `tree.growth`."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a tree came from and what growing it cost."""

    lease_id: str
    actor: str
    decoded_tokens: int = 0
    """Tokens the engine decoded, cut ones included."""
    wasted_tokens: int = 0
    """Decoded tokens behind a stop, cut off."""
    cached_tokens: int = 0
    """Prompt and prefix tokens served from the prefix cache."""
    prefix_tokens: int = 0
    """Prompt and prefix tokens submitted."""
    num_requests: int = 0
    num_fallbacks: int = 0
    num_pruned: int = 0
    """Paths ended by a pruning rule or because they repeated themselves."""
    saved_tokens: int = 0
    """Tokens that these would have decoded to the mean length of the others, estimated."""
    grow_s: float = 0.0
    overhead_s: float = 0.0
    """Time of all requests outside of the server, summed."""
    num_children: int = 0
    """Runs that continued a segment of the tree, and so had a prefix on some engine."""
    num_spilled: int = 0
    """Those that another engine took, as that one had too much to do."""
    num_migrated: int = 0
    """Those that another engine took, as that one was out."""
    moved_tokens: int = 0
    """Prefix tokens computed again for these."""
    refilled_tokens: int = 0
    """Prefix tokens that an engine computed again for children since it had got other weights."""
    notes: tuple[str, ...] = ()
    """Anything that makes the tree differ from its rules, e.g. fewer leaves than its width."""


@dataclass(frozen=True)
class Tree:
    """All segments grown from one prompt, with one reward per leaf.

    Segments stand in creation order (`parent < index`); a leaf is a segment without children, and leaves
    are counted in the order of their segments.
    """

    prompt: Prompt
    segments: tuple[Segment, ...]
    rewards_L: Float32
    """[L], NaN where scoring failed: such a leaf is left out of every group and of the loss."""
    accuracies_L: Float32
    """[L], 1 for a right answer and 0 for a wrong one, before any shaping; NaN where scoring failed."""
    sampling: Sampling
    provenance: Provenance

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """Segment index of each leaf, [L]."""
        return leaves_of(self.segments)

    def path(self, segment: int) -> tuple[int, ...]:
        """Segment indices from the prompt down to and including `segment`."""
        return path_of(self.segments, segment)

    @cached_property
    def num_tokens(self) -> int:
        """Sampled tokens, each counted once."""
        return sum(len(s) for s in self.segments)

    @cached_property
    def num_tokens_L(self) -> NDArray[np.int64]:
        """Response tokens of each trajectory, [L]."""
        paths = (self.path(leaf) for leaf in self.leaves)
        return np.array(
            [sum(len(self.segments[i]) for i in path) for path in paths], dtype=np.int64
        )

    @cached_property
    def num_delivered_tokens(self) -> int:
        """Sampled tokens counted once per trajectory they belong to; a pruned path is none."""
        return int(self.num_tokens_L[self.is_whole_L].sum())

    @cached_property
    def is_whole_L(self) -> NDArray[np.bool_]:
        """Whether each leaf ends a trajectory, and not a pruned path, [L]."""
        stops = (self.segments[leaf].stop for leaf in self.leaves)
        return np.array([stop is not StopReason.PRUNED for stop in stops], dtype=np.bool_)

    @cached_property
    def whole_segments(self) -> tuple[Segment, ...]:
        """Segments of trajectories, without those of pruned paths alone; all of them where no path is whole."""
        leaves = [leaf for leaf, whole in zip(self.leaves, self.is_whole_L, strict=True) if whole]
        kept = {i for leaf in leaves for i in self.path(leaf)}
        return tuple(self.segments[i] for i in sorted(kept)) or self.segments

    def check(self) -> None:
        """Raise TreeError, naming the field, unless every invariant of the class holds."""
        if len(self.prompt.token_ids) == 0:
            raise TreeError("prompt.token_ids is empty: a tree needs at least one prompt token")
        if not self.segments:
            raise TreeError("segments is empty: a tree needs at least one segment")
        _check_sampling(self.sampling)
        _check_segments(self.segments, self.sampling)
        for leaf in self.leaves:
            if self.segments[leaf].stop is None:
                raise TreeError(f"segments[{leaf}].stop is None, but nothing continues the segment")
        for name in ("rewards_L", "accuracies_L"):
            values_L = getattr(self, name)
            if len(values_L) != len(self.leaves):
                raise TreeError(
                    f"{name} has {len(values_L)} values, the tree has {len(self.leaves)} leaves"
                )
            if np.isinf(values_L).any():
                raise TreeError(f"{name} has an infinite value; a failed score is NaN")


def path_of(segments: Sequence[Segment], segment: int) -> tuple[int, ...]:
    """Indices from the prompt down to and including `segment`; none for `ROOT`."""
    steps = []
    while segment != ROOT:
        steps.append(segment)
        segment = segments[segment].parent
    return tuple(reversed(steps))


def leaves_of(segments: tuple[Segment, ...]) -> tuple[int, ...]:
    """Indices of the segments without children, ascending."""
    parents = {s.parent for s in segments}
    return tuple(i for i in range(len(segments)) if i not in parents)


def _check_sampling(sampling: Sampling) -> None:
    for name in ("segment_tokens", "max_depth", "width", "branching_factor"):
        if getattr(sampling, name) < 1:
            raise TreeError(f"sampling.{name} is {getattr(sampling, name)}, it must be at least 1")
    if not 0 < sampling.temperature < math.inf:
        raise TreeError(
            f"sampling.temperature is {sampling.temperature}, it must be above 0 and finite"
        )


def _check_segments(segments: tuple[Segment, ...], sampling: Sampling) -> None:
    ends: list[int] = []
    chances: list[float] = []
    for i, segment in enumerate(segments):
        if not ROOT <= segment.parent < i:
            raise TreeError(
                f"segments[{i}].parent is {segment.parent}, it must be in {ROOT}..{i - 1}"
            )
        if segment.parent != ROOT and segments[segment.parent].stop is not None:
            raise TreeError(
                f"segments[{i}].parent {segment.parent} has ended: it may have no children"
            )
        if segment.stop is StopReason.ABORT:
            raise TreeError(f"segments[{i}].stop is abort: an aborted run belongs to no tree")
        _check_tokens(i, segment)
        if not 0 < segment.inclusion <= 1:
            raise TreeError(
                f"segments[{i}].inclusion is {segment.inclusion}, it must be above 0 and at most 1"
            )
        chances.append(
            segment.inclusion * (1 if segment.parent == ROOT else chances[segment.parent])
        )
        if chances[i] < LEAST_CHANCE:
            raise TreeError(
                f"segments[{i}].inclusion is {segment.inclusion}: the product over its path is below {LEAST_CHANCE}"
            )
        start = 0 if segment.parent == ROOT else ends[segment.parent]
        ends.append(start + len(segment))
        _check_level(i, segment, start, sampling)


def _check_tokens(i: int, segment: Segment) -> None:
    logprobs = segment.behavior_logprobs
    if len(segment) == 0 or len(segment) != len(logprobs):
        raise TreeError(
            f"segments[{i}] has {len(segment)} token_ids and {len(logprobs)} behavior_logprobs; "
            "it needs as many, at least one"
        )
    if not (np.isfinite(logprobs).all() and logprobs.max() <= LOGPROB_SLACK):
        raise TreeError(f"segments[{i}].behavior_logprobs are not finite log-probs")


def _check_level(i: int, segment: Segment, start: int, sampling: Sampling) -> None:
    last = start + len(segment) - 1
    if not start // sampling.segment_tokens == segment.level == last // sampling.segment_tokens:
        raise TreeError(
            f"segments[{i}].level is {segment.level}, but its tokens {start}..{last} "
            f"lie on a grid of {sampling.segment_tokens}"
        )
    if segment.level >= sampling.max_depth:
        raise TreeError(
            f"segments[{i}].level is {segment.level}, it must be below "
            f"sampling.max_depth={sampling.max_depth}"
        )


class Trajectory(NamedTuple):
    """A root-to-leaf path of a tree: a view for scoring and display, never stored."""

    tree: Tree
    leaf: int
    """Index into `tree.leaves`."""

    @property
    def token_ids(self) -> Int32:
        """Response tokens, [T]."""
        path = self.tree.path(self.tree.leaves[self.leaf])
        return np.concatenate([self.tree.segments[i].token_ids for i in path])

    @property
    def stop(self) -> StopReason | None:
        """Why the trajectory ended."""
        return self.tree.segments[self.tree.leaves[self.leaf]].stop
