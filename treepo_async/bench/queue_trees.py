"""Valid trees of a given size, and their frames for each lease. Pure: no sockets, no clock.

Neighbours: `queue_client` delivers them. All deliveries share one tree's arrays, so that a million of them take no
memory and no time to make; what differs is the header, which names the lease.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)
from treepo_async.wire.codec import digest_of, encode_tree, header_of
from treepo_async.wire.columns import ARRAYS
from treepo_async.wire.messages import PutTree, encode, numbered

VOCAB_SIZE = 151_936
"""Of Qwen2.5."""
PROMPT_TOKENS = 256
STEPS = 2 + [name for name, _ in ARRAYS].index("step_S")
"""Place of the frame with the policy steps of the segments."""
WIDTH = 64
"""Most paths of a tree at once, as in the paper."""


def make_tree(num_tokens: int, segment_tokens: int, seed: int = 0) -> Tree:
    """A tree of segments of one length that forks into two at each level until it has `WIDTH` paths.

    Args:
        num_tokens: unique tokens, a multiple of `segment_tokens`.
        segment_tokens: of each segment.
        seed: of token ids, log-probs and rewards.
    """
    rng = np.random.default_rng(seed)
    levels = _levels(num_tokens // segment_tokens)
    parents = [parent for level in levels for parent in level]
    level_S = [depth for depth, level in enumerate(levels) for _ in level]
    inner = set(parents)
    segments = tuple(
        Segment(
            parent=parent,
            level=level,
            token_ids=rng.integers(1, VOCAB_SIZE, segment_tokens, dtype=np.int32),
            behavior_logprobs=-rng.exponential(1.0, segment_tokens).astype(np.float32),
            policy_version=PolicyVersion(0, 0),
            stop=None if i in inner else StopReason.EOS,
        )
        for i, (parent, level) in enumerate(zip(parents, level_S, strict=True))
    )
    num_leaves = len(segments) - len(inner - {ROOT})
    rewards_L = (np.arange(num_leaves) % 2).astype(np.float32)
    prompt = prompt_of(0)
    tree = Tree(
        prompt=prompt,
        segments=segments,
        rewards_L=rewards_L,
        accuracies_L=rewards_L.copy(),
        sampling=Sampling(1.0, segment_tokens, len(levels), WIDTH, 2),
        provenance=Provenance("", "bench"),
    )
    tree.check()
    return tree


def prompt_of(index: int) -> Prompt:
    """The prompt of an index."""
    token_ids = np.arange(1, PROMPT_TOKENS + 1, dtype=np.int32)
    return Prompt(f"bench-{index}", token_ids, "a problem of a benchmark", "42")


def _levels(num_segments: int) -> list[list[int]]:
    """Parents of the segments of each level."""
    levels: list[list[int]] = []
    before, number = [ROOT, ROOT], 0
    while number < num_segments:
        level = before[: num_segments - number]
        indices = range(number, number + len(level))
        copies = 2 if 2 * len(level) <= WIDTH else 1
        before = [index for index in indices for _ in range(copies)]
        number += len(level)
        levels.append(level)
    return levels


@dataclass(frozen=True, slots=True)
class Deliveries:
    """A tree, ready to be delivered for any lease."""

    tree: Tree
    frames: Sequence[bytes]

    @classmethod
    def of(cls, tree: Tree) -> Self:
        """Encode the tree."""
        return cls(tree, encode_tree(tree))

    def put(self, lease_id: str, attempt: int, step: int = 0) -> tuple[PutTree, list[bytes]]:
        """The delivery for a lease, sampled at a policy step: message and attachment."""
        provenance = replace(self.tree.provenance, lease_id=lease_id)
        header = header_of(replace(self.tree, provenance=provenance))
        tree = [self.frames[0], header, *self.frames[2:]]
        tree[STEPS] = np.full(len(self.tree.segments), step, "<i4").tobytes()
        return PutTree(lease_id=lease_id, attempt=attempt, digest=digest_of(tree)), tree

    def frames_of(self, lease_id: str, attempt: int, request: int) -> list[bytes]:
        """The same as frames of a message, numbered; of policy step 0."""
        message, tree = self.put(lease_id, attempt)
        return [encode(numbered(message, request)), *tree]
