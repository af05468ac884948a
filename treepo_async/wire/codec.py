"""Tree <-> frames: a msgspec header and one raw array per field, so that a sampled token costs 8 bytes.

Frames: `[b"TPO2", header, *arrays]`, arrays little-endian in the order of `ARRAYS`. The header holds no lengths:
they follow from the frames themselves, so a lying number cannot make the receiver allocate. The same frames go
over the wire, into the spool and into tree files.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import TreeError, WireError
from treepo_async.types import (
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)

MAGIC = b"TPO2"

ARRAYS: tuple[tuple[str, np.dtype[np.generic]], ...] = (
    ("prompt_ids_P", np.dtype("<i4")),
    ("token_ids_T", np.dtype("<i4")),
    ("behavior_logprobs_T", np.dtype("<f4")),
    ("parent_S", np.dtype("<i4")),
    ("level_S", np.dtype("<i4")),
    ("length_S", np.dtype("<i4")),
    ("lineage_S", np.dtype("<i4")),
    ("step_S", np.dtype("<i4")),
    ("stop_S", np.dtype("<i1")),
    ("mixed_context_S", np.dtype("<i1")),
    ("inclusion_S", np.dtype("<f8")),
    ("rewards_L", np.dtype("<f4")),
    ("accuracies_L", np.dtype("<f4")),
)

_STOPS: tuple[StopReason | None, ...] = (None, *StopReason)


class _Header(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    prompt_id: str
    text: str
    answer: str
    sampling: Sampling
    provenance: Provenance


_header_encoder = msgspec.msgpack.Encoder()
_header_decoder = msgspec.msgpack.Decoder(_Header)


def encode_tree(tree: Tree) -> list[bytes]:
    """Frames of a tree; `decode_tree` gives an equal tree."""
    segments = tree.segments
    header = _Header(
        prompt_id=tree.prompt.id,
        text=tree.prompt.text,
        answer=tree.prompt.answer,
        sampling=tree.sampling,
        provenance=tree.provenance,
    )
    columns = {
        "prompt_ids_P": tree.prompt.token_ids,
        "token_ids_T": np.concatenate([s.token_ids for s in segments]),
        "behavior_logprobs_T": np.concatenate([s.behavior_logprobs for s in segments]),
        "parent_S": [s.parent for s in segments],
        "level_S": [s.level for s in segments],
        "length_S": [len(s) for s in segments],
        "lineage_S": [s.policy_version.lineage for s in segments],
        "step_S": [s.policy_version.step for s in segments],
        "stop_S": [_STOPS.index(s.stop) for s in segments],
        "mixed_context_S": [s.mixed_context for s in segments],
        "inclusion_S": [s.inclusion for s in segments],
        "rewards_L": tree.rewards_L,
        "accuracies_L": tree.accuracies_L,
    }
    arrays = [np.asarray(columns[name], dtype=dtype).tobytes() for name, dtype in ARRAYS]
    return [MAGIC, _header_encoder.encode(header), *arrays]


def decode_tree(frames: Sequence[bytes], *, vocab_size: int | None = None) -> Tree:
    """The tree in `frames`, checked against every invariant of `Tree`.

    Args:
        frames: what `encode_tree` gave.
        vocab_size: refuse token ids outside of it.

    Raises:
        WireError: naming the frame or field that is wrong.
    """
    if len(frames) != 2 + len(ARRAYS):
        raise WireError(f"a tree has {2 + len(ARRAYS)} frames, got {len(frames)}")
    if bytes(frames[0]) != MAGIC:
        raise WireError(f"frame 0 is {bytes(frames[0])[:8]!r}, expected {MAGIC!r}")
    header = _decode_header(frames[1])
    _check_costs(header.provenance)
    columns = {
        name: _column(name, dtype, raw)
        for (name, dtype), raw in zip(ARRAYS, frames[2:], strict=True)
    }
    _check_lengths(columns)
    for name in ("prompt_ids_P", "token_ids_T"):
        _check_range(name, columns[name], 0, vocab_size)
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


def _decode_header(frame: bytes) -> _Header:
    try:
        header = _header_decoder.decode(frame)
        raw = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"tree header: {error}") from error
    # msgspec forbids unknown fields in its own structs only, not in dataclasses
    for part, noun in (("sampling", Sampling), ("provenance", Provenance)):
        unknown = raw[part].keys() - {field.name for field in fields(noun)}
        if unknown:
            raise WireError(f"tree header: {part} has the unknown field {unknown.pop()}")
    return header


def _check_costs(provenance: Provenance) -> None:
    """Costs are added up over a run, so that one of them that is no number would spoil all."""
    for name, value in asdict(provenance).items():
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise WireError(f"provenance.{name} is {value}, it must be at least 0 and finite")


def _column(name: str, dtype: np.dtype[np.generic], raw: bytes) -> NDArray[Any]:
    if len(raw) % dtype.itemsize:
        raise WireError(f"{name} has {len(raw)} bytes, not a multiple of {dtype.itemsize}")
    return np.frombuffer(raw, dtype=dtype)


def _check_lengths(columns: dict[str, NDArray[Any]]) -> None:
    for axis, reference in (("T", "token_ids_T"), ("S", "parent_S"), ("L", "rewards_L")):
        for name, column in columns.items():
            if name.endswith(f"_{axis}") and len(column) != len(columns[reference]):
                raise WireError(
                    f"{name} has {len(column)} values, {reference} has {len(columns[reference])}"
                )
    lengths = columns["length_S"].astype(np.int64)
    if (lengths < 1).any() or lengths.sum() != len(columns["token_ids_T"]):
        raise WireError(
            f"length_S must be at least 1 and sum to {len(columns['token_ids_T'])} tokens"
        )
    _check_range("stop_S", columns["stop_S"], 0, len(_STOPS))
    _check_range("mixed_context_S", columns["mixed_context_S"], 0, 2)
    _check_range("step_S", columns["step_S"], 0, None)
    _check_range("lineage_S", columns["lineage_S"], 0, None)


def _check_range(name: str, values: NDArray[Any], low: int, high: int | None) -> None:
    numbers = values.astype(np.int64)
    if (numbers < low).any() or (high is not None and (numbers >= high).any()):
        raise WireError(f"{name} has a value outside {low}..{'' if high is None else high - 1}")


def _segments(columns: dict[str, NDArray[Any]]) -> tuple[Segment, ...]:
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
            stop=_STOPS[stop],
            mixed_context=bool(mixed),
            inclusion=inclusion,
        )
        for begin, end, parent, level, lineage, step, stop, mixed, inclusion in rows
    )
