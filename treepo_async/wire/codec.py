"""Tree <-> frames: a msgspec header and one raw array per field, so that a sampled token costs 8 bytes.

Frames: `[b"TPO2", header, *arrays]`, arrays little-endian in the order of `ARRAYS`. The header holds no lengths:
they follow from the frames themselves, so a lying number cannot make the receiver allocate. The same frames go
over the wire, into the spool and into tree files. Neighbours: `columns` takes frames apart, `facts` sums them up without a
`Tree`.
"""

import struct
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash

from treepo_async.errors import TreeError, WireError
from treepo_async.types import PolicyVersion, Prompt, Segment, Tree
from treepo_async.wire.columns import ARRAYS, MAGIC, STOPS, Columns, Header, read_frames

_header_encoder = msgspec.msgpack.Encoder()


def encode_tree(tree: Tree) -> list[bytes]:
    """Frames of a tree; `decode_tree` gives an equal tree."""
    segments = tree.segments
    columns = {
        "prompt_ids_P": tree.prompt.token_ids,
        "token_ids_T": np.concatenate([s.token_ids for s in segments]),
        "behavior_logprobs_T": np.concatenate([s.behavior_logprobs for s in segments]),
        "parent_S": [s.parent for s in segments],
        "level_S": [s.level for s in segments],
        "length_S": [len(s) for s in segments],
        "lineage_S": [s.policy_version.lineage for s in segments],
        "step_S": [s.policy_version.step for s in segments],
        "stop_S": [STOPS.index(s.stop) for s in segments],
        "mixed_context_S": [s.mixed_context for s in segments],
        "inclusion_S": [s.inclusion for s in segments],
        "rewards_L": tree.rewards_L,
        "accuracies_L": tree.accuracies_L,
    }
    arrays = [np.asarray(columns[name], dtype=dtype).tobytes() for name, dtype in ARRAYS]
    return [MAGIC, header_of(tree), *arrays]


def header_of(tree: Tree) -> bytes:
    """The frame of all that is no array: the only one that differs between two leases' deliveries of the same tokens."""
    header = Header(
        prompt_id=tree.prompt.id,
        text=tree.prompt.text,
        answer=tree.prompt.answer,
        sampling=tree.sampling,
        provenance=tree.provenance,
    )
    return _header_encoder.encode(header)


def digest_of(frames: Sequence[bytes]) -> int:
    """xxh3, 64 bits unsigned, over the number of frames, their lengths, and their bytes.

    It finds damage and tells two trees of one lease apart; it is no protection against whoever wants two frames
    to have the same one.
    """
    digest = xxhash.xxh3_64(struct.pack(f"<{1 + len(frames)}Q", len(frames), *map(len, frames)))
    for frame in frames:
        digest.update(frame)
    return digest.intdigest()


def decode_tree(frames: Sequence[bytes], *, vocab_size: int | None = None) -> Tree:
    """The tree in `frames`, checked against every invariant of `Tree`.

    Args:
        frames: what `encode_tree` gave.
        vocab_size: refuse token ids outside of it.

    Raises:
        WireError: naming the frame or field that is wrong.
    """
    header, columns = read_frames(frames, vocab_size=vocab_size)
    tree = Tree(
        prompt=Prompt(header.prompt_id, columns["prompt_ids_P"], header.text, header.answer),
        segments=_segments(columns),
        rewards_L=columns["rewards_L"],
        accuracies_L=columns["accuracies_L"],
        sampling=header.sampling,
        provenance=header.provenance,
    )
    try:
        tree.check()
    except TreeError as error:
        raise WireError(str(error)) from error
    return tree


def _segments(columns: Columns) -> tuple[Segment, ...]:
    ends = np.cumsum(columns["length_S"])
    rows = zip(
        ends - columns["length_S"],
        ends,
        *(
            columns[name].tolist()
            for name in ("parent_S", "level_S", "lineage_S", "step_S", "stop_S")
        ),
        columns["mixed_context_S"].tolist(),
        columns["inclusion_S"].tolist(),
        strict=True,
    )
    return tuple(
        Segment(
            parent=parent,
            level=level,
            token_ids=columns["token_ids_T"][begin:end],
            behavior_logprobs=columns["behavior_logprobs_T"][begin:end],
            policy_version=PolicyVersion(lineage, step),
            stop=STOPS[stop],
            mixed_context=bool(mixed),
            inclusion=inclusion,
        )
        for begin, end, parent, level, lineage, step, stop, mixed, inclusion in rows
    )
