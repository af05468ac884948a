"""A share as one buffer, for the way from rank 0 to the ranks of a replica, and the numbers of tokens for the way back.

Neighbours: `team` writes and reads on both sides, `control` carries.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from treepo_async.learner.packing.bounds import Bounds
from treepo_async.learner.packing.geometry import Float64
from treepo_async.learner.packing.piece import Piece
from treepo_async.learner.packing.share import SegmentValues, Share
from treepo_async.types import Tree
from treepo_async.wire.codec import decode_tree, encode_tree


def share_to_bytes(share: Share) -> bytes:
    """The share as one buffer: a JSON header, the numbers per leaf and token, the trees as they are on the wire."""
    frames = [encode_tree(tree) for tree in share.trees]
    header = json.dumps(
        {
            "microbatches": [[asdict(p) for p in pieces] for pieces in share.microbatches],
            "advantages": [values.shape for values in share.advantages],
            "weights": [values.shape for values in share.weights],
            "has_proximal": share.proximal is not None,
            "has_reference": share.reference is not None,
            "bounds": asdict(share.bounds),
            "frames": [[len(frame) for frame in tree] for tree in frames],
        }
    ).encode()
    parts = [len(header).to_bytes(8, "little"), header]
    parts += [np.asarray(v, np.float64).tobytes() for v in (*share.advantages, *share.weights)]
    parts += [values_to_bytes(v) for v in (*(share.proximal or ()), *(share.reference or ()))]
    return b"".join([*parts, *(frame for tree in frames for frame in tree)])


def share_from_bytes(data: bytes) -> Share:
    """Read what `share_to_bytes` wrote."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    cursor, behind = _Cursor(data, begin), _Cursor(data, begin)
    sizes = [sum(frames) for frames in header["frames"]]
    behind.take(len(data) - begin - sum(sizes))
    trees = tuple(decode_tree([behind.take(n) for n in frames]) for frames in header["frames"])
    return Share(
        trees=trees,
        advantages=cursor.take_arrays(header["advantages"]),
        weights=cursor.take_arrays(header["weights"]),
        microbatches=tuple(
            tuple(Piece(p["tree"], tuple(p["leaves"])) for p in pieces)
            for pieces in header["microbatches"]
        ),
        proximal=cursor.take_values(trees) if header["has_proximal"] else None,
        reference=cursor.take_values(trees) if header["has_reference"] else None,
        bounds=Bounds(**header["bounds"]),
    )


def values_to_bytes(values: SegmentValues) -> bytes:
    """The numbers of a tree's tokens, segment after segment."""
    return b"".join(np.asarray(v, np.float32).tobytes() for v in values)


def values_from_bytes(tree: Tree, data: bytes) -> SegmentValues:
    """Read what `values_to_bytes` wrote for this tree."""
    flat = np.frombuffer(data, np.float32)
    return tuple(np.split(flat, np.cumsum([len(s) for s in tree.segments])[:-1]))


class _Cursor:
    """Takes consecutive pieces of a buffer."""

    def __init__(self, data: bytes, begin: int) -> None:
        self._data, self._at = data, begin

    def take(self, num_bytes: int) -> bytes:
        piece = self._data[self._at : self._at + num_bytes]
        self._at += num_bytes
        return piece

    def take_arrays(self, shapes: Sequence[Any]) -> tuple[Float64, ...]:
        return tuple(
            np.frombuffer(self.take(8 * math.prod(shape))).reshape(shape) for shape in shapes
        )

    def take_values(self, trees: Sequence[Tree]) -> tuple[SegmentValues, ...]:
        return tuple(values_from_bytes(t, self.take(4 * t.num_tokens)) for t in trees)
