"""The frames of a tree, taken apart but not put together: its header, and one checked array per field.

Neighbours: `codec` makes a `Tree` of them, `facts` sums them up without one. Here stands what both need: sizes, ranges, and
the types of the header. That the arrays describe a tree is theirs to check.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import WireError
from treepo_async.types import Provenance, Sampling, StopReason

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

STOPS: tuple[StopReason | None, ...] = (None, *StopReason)
"""By code."""

_REFERENCES = {"T": "token_ids_T", "S": "parent_S", "L": "rewards_L"}
"""Array that the others of its axis are as long as."""
_AS_UNSIGNED: dict[int, tuple[np.dtype[Any], int]] = {
    1: (np.dtype("<u1"), 2**7),
    4: (np.dtype("<u4"), 2**31),
}
"""By bytes of a number: its type without a sign, and the first number that has one."""
_COSTS = tuple(field.name for field in fields(Provenance) if field.type in (int, float))
_PARTS = (
    ("sampling", frozenset(field.name for field in fields(Sampling))),
    ("provenance", frozenset(field.name for field in fields(Provenance))),
)

Columns = dict[str, NDArray[Any]]


class Header(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What of a tree is no array."""

    prompt_id: str
    text: str
    answer: str
    sampling: Sampling
    provenance: Provenance


_header_decoder = msgspec.msgpack.Decoder(Header)


def read_frames(frames: Sequence[bytes], *, vocab_size: int | None) -> tuple[Header, Columns]:
    """Header and arrays by name; the arrays are views of the frames.

    Args:
        frames: of a tree.
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
    _check_ranges(columns, vocab_size)
    return header, columns


def _decode_header(frame: bytes) -> Header:
    try:
        header = _header_decoder.decode(frame)
        raw = msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"tree header: {error}") from error
    # msgspec forbids unknown fields in its own structs only, not in dataclasses
    for part, names in _PARTS:
        unknown = raw[part].keys() - names
        if unknown:
            raise WireError(f"tree header: {part} has the unknown field {unknown.pop()}")
    return header


def _check_costs(provenance: Provenance) -> None:
    """Costs are added up over a run, so that one of them that is no number would spoil all."""
    for name in _COSTS:
        value = getattr(provenance, name)
        if not 0 <= value < math.inf:
            raise WireError(f"provenance.{name} is {value}, it must be at least 0 and finite")


def _column(name: str, dtype: np.dtype[np.generic], raw: bytes) -> NDArray[Any]:
    if len(raw) % dtype.itemsize:
        raise WireError(f"{name} has {len(raw)} bytes, not a multiple of {dtype.itemsize}")
    return np.frombuffer(raw, dtype=dtype)


def _check_lengths(columns: Columns) -> None:
    for name, column in columns.items():
        reference = _REFERENCES.get(name[-1])
        if reference is not None and len(column) != len(columns[reference]):
            raise WireError(
                f"{name} has {len(column)} values, {reference} has {len(columns[reference])}"
            )
    lengths, num_tokens = columns["length_S"], len(columns["token_ids_T"])
    if np.count_nonzero(lengths < 1) or lengths.sum(dtype=np.int64) != num_tokens:
        raise WireError(f"length_S must be at least 1 and sum to {num_tokens} tokens")


def _check_ranges(columns: Columns, vocab_size: int | None) -> None:
    _check_range("stop_S", columns["stop_S"], len(STOPS))
    _check_range("mixed_context_S", columns["mixed_context_S"], 2)
    _check_range("step_S", columns["step_S"], None)
    _check_range("lineage_S", columns["lineage_S"], None)
    _check_range("prompt_ids_P", columns["prompt_ids_P"], vocab_size)
    _check_range("token_ids_T", columns["token_ids_T"], vocab_size)


def _check_range(name: str, values: NDArray[Any], high: int | None) -> None:
    """From 0 to below `high`; read as unsigned numbers, those below 0 are the largest, so one look is enough."""
    if len(values) == 0:
        return
    unsigned, signed_limit = _AS_UNSIGNED[values.itemsize]
    largest = int(np.maximum.reduce(values.view(unsigned)))
    if largest >= (signed_limit if high is None else min(high, signed_limit)):
        raise WireError(f"{name} has a value outside 0..{'' if high is None else high - 1}")
