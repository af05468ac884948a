"""How a batch of trees is divided over data-parallel replicas and microbatches: made once, on rank 0.

Neighbours: the worker divides, `control` carries each replica its share, `step` lays the share out and trains it.
Pure Python and numpy.

Invariant: every tree is in exactly one microbatch of exactly one replica, and all replicas have equally many
microbatches, as the pipeline schedule demands; what is short is an empty microbatch, which trains nothing.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from treepo_async.errors import TreeError
from treepo_async.learner.pack import Float64, next_fit, num_packed_tokens
from treepo_async.types import Tree
from treepo_async.wire.codec import decode_tree, encode_tree


@dataclass(frozen=True, slots=True)
class Share:
    """What one data-parallel replica trains of a batch."""

    trees: tuple[Tree, ...]
    advantages: tuple[Float64, ...]
    """Per tree [L] or [L, D]."""
    microbatches: tuple[tuple[int, ...], ...]
    """Indices into `trees`; an empty microbatch trains nothing."""

    def to_bytes(self) -> bytes:
        """The share as one buffer: a JSON header, the advantages, the trees as they are on the wire."""
        frames = [encode_tree(tree) for tree in self.trees]
        header = json.dumps(
            {
                "microbatches": self.microbatches,
                "advantages": [values.shape for values in self.advantages],
                "frames": [[len(frame) for frame in tree] for tree in frames],
            }
        ).encode()
        parts = [len(header).to_bytes(8, "little"), header]
        parts += [np.asarray(values, np.float64).tobytes() for values in self.advantages]
        return b"".join([*parts, *(frame for tree in frames for frame in tree)])

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what `to_bytes` wrote."""
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        cursor = _Cursor(data, begin)
        return cls(
            advantages=tuple(
                np.frombuffer(cursor.take(8 * math.prod(shape))).reshape(shape)
                for shape in header["advantages"]
            ),
            trees=tuple(
                decode_tree([cursor.take(size) for size in sizes]) for sizes in header["frames"]
            ),
            microbatches=tuple(tuple(indices) for indices in header["microbatches"]),
        )


def divide(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    *,
    num_replicas: int,
    budget_tokens: int,
) -> list[Share]:
    """Group trees into microbatches and deal these out to the replicas in turn.

    A microbatch takes the next tree in order as long as it fits, by unique tokens with the prompt counted.

    Args:
        trees: the batch.
        advantages: per tree `[L]` or `[L, D]`, leaves and grid levels.
        num_replicas: data-parallel size.
        budget_tokens: most tokens of a microbatch; a single larger tree gets one of its own.

    Returns:
        One share per replica.

    Raises:
        TreeError: there are not as many advantages as trees.
    """
    if len(trees) != len(advantages):
        raise TreeError(f"{len(trees)} trees and {len(advantages)} rows of advantages")
    microbatches = next_fit([num_packed_tokens(tree) for tree in trees], budget_tokens)
    num_each = max(1, -(-len(microbatches) // num_replicas))
    return [
        _share(trees, advantages, microbatches[replica::num_replicas], num_each)
        for replica in range(num_replicas)
    ]


def _share(
    trees: Sequence[Tree],
    advantages: Sequence[Float64],
    microbatches: Sequence[Sequence[int]],
    num_each: int,
) -> Share:
    chosen = [index for indices in microbatches for index in indices]
    starts = np.cumsum([0, *(len(indices) for indices in microbatches)]).tolist()
    local = [
        tuple(range(start, start + len(indices)))
        for start, indices in zip(starts, microbatches, strict=False)
    ]
    return Share(
        trees=tuple(trees[i] for i in chosen),
        advantages=tuple(advantages[i] for i in chosen),
        microbatches=(*local, *[()] * (num_each - len(local))),
    )


class _Cursor:
    """Takes consecutive pieces of a buffer."""

    def __init__(self, data: bytes, begin: int) -> None:
        self._data, self._at = data, begin

    def take(self, num_bytes: int) -> bytes:
        piece = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return piece
