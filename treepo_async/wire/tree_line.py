"""Tree <-> one line of JSON: what tree files hold.

A line is for people and for other programs; `codec` is for the wire. Reading one goes through the frames of `codec`, so
a line that is taken has passed every check of the wire. Invariant: `decode_line(encode_line(tree))` is the tree that
the wire would carry, bit for bit: a float32 is written as its shortest decimal, and a failed score as null.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import msgspec
import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import WireError
from treepo_async.types import (
    Float32,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
)
from treepo_async.wire.codec import decode_tree, encode_tree

FORMAT = 1
"""Of the lines; another number is refused."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text."""


def _strict(noun: type[Any]) -> type[msgspec.Struct]:
    """The noun as a struct that refuses unknown fields, which msgspec does not for dataclasses."""
    hints = get_type_hints(noun)
    rows = [
        (f.name, hints[f.name]) if f.default is MISSING else (f.name, hints[f.name], f.default)
        for f in fields(noun)
    ]
    return msgspec.defstruct(noun.__name__, rows, frozen=True, forbid_unknown_fields=True)


_Sampling, _Provenance = _strict(Sampling), _strict(Provenance)


class SegmentLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A segment."""

    parent: int
    level: int
    token_ids: list[int]
    logprobs: list[float]
    policy_version: str
    stop: StopReason | None = None
    inclusion: float = 1.0
    mixed_context: bool = False
    text: str | None = None
    """For people; not read."""


class TreeLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tree."""

    format: int
    prompt_id: str
    prompt: str
    answer: str
    prompt_token_ids: list[int]
    rewards: Sequence[float | None]
    accuracies: Sequence[float | None]
    segments: list[SegmentLine]
    sampling: _Sampling  # type: ignore[valid-type]
    provenance: _Provenance  # type: ignore[valid-type]


_encoder = msgspec.json.Encoder()
_tree_decoder = msgspec.json.Decoder(TreeLine)


def encode_line(tree: Tree, decode: Decode | None = None) -> bytes:
    """A tree as one line, without a line end.

    Args:
        tree: scored.
        decode: gives the segments a text.
    """
    prompt = tree.prompt
    return _encoder.encode(
        TreeLine(
            format=FORMAT,
            prompt_id=prompt.id,
            prompt=prompt.text,
            answer=prompt.answer,
            prompt_token_ids=prompt.token_ids.tolist(),
            rewards=shortest(tree.rewards_L),
            accuracies=shortest(tree.accuracies_L),
            segments=[_segment_line(segment, decode) for segment in tree.segments],
            sampling=tree.sampling,
            provenance=tree.provenance,
        )
    )


def decode_line(line: bytes, *, vocab_size: int | None = None) -> Tree:
    """The tree in a line.

    Args:
        line: what `encode_line` gave.
        vocab_size: refuse token ids outside of it.

    Raises:
        WireError: naming the field that is wrong.
    """
    try:
        found = _tree_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"tree line: {error}") from error
    return _tree_of(found, vocab_size)


def decode_row(row: Mapping[str, Any], *, vocab_size: int | None = None) -> Tree:
    """The tree in the row of a table, which has the fields of a line.

    Raises:
        WireError: as `decode_line`.
    """
    try:
        found = msgspec.convert(row, TreeLine)
    except msgspec.ValidationError as error:
        raise WireError(f"tree row: {error}") from error
    return _tree_of(found, vocab_size)


def shortest(values: Float32) -> list[float]:
    """Numbers whose shortest decimals, which is how JSON is written, read back as the same float32s."""
    exact: NDArray[np.float64] = values.astype(np.float64)
    short = values.astype(str).astype(np.float64)
    # a decimal is read as a double first, which could round to the float32 beside the right one
    same = short.astype(np.float32) == values
    result: list[float] = np.where(same, short, exact).tolist()
    return result


def _segment_line(segment: Segment, decode: Decode | None) -> SegmentLine:
    return SegmentLine(
        parent=segment.parent,
        level=segment.level,
        token_ids=segment.token_ids.tolist(),
        logprobs=shortest(segment.behavior_logprobs),
        policy_version=str(segment.policy_version),
        stop=segment.stop,
        inclusion=segment.inclusion,
        mixed_context=segment.mixed_context,
        text=None if decode is None else decode(segment.token_ids.tolist()),
    )


def _tree_of(line: TreeLine, vocab_size: int | None) -> Tree:
    if line.format != FORMAT:
        raise WireError(f"tree line: format is {line.format}, this program reads {FORMAT}")
    tree = Tree(
        prompt=Prompt(
            line.prompt_id,
            _ids("prompt_token_ids", line.prompt_token_ids),
            line.prompt,
            line.answer,
        ),
        segments=tuple(_segment(i, segment) for i, segment in enumerate(line.segments)),
        rewards_L=_floats(line.rewards),
        accuracies_L=_floats(line.accuracies),
        sampling=Sampling(**msgspec.structs.asdict(line.sampling)),
        provenance=Provenance(**msgspec.structs.asdict(line.provenance)),
    )
    if not tree.segments:
        raise WireError("tree line: segments is empty: a tree needs at least one segment")
    try:
        return decode_tree(encode_tree(tree), vocab_size=vocab_size)
    except OverflowError as error:
        raise WireError(f"tree line: a number is too large: {error}") from error


def _segment(i: int, line: SegmentLine) -> Segment:
    try:
        version = PolicyVersion.parse(line.policy_version)
    except ValueError as error:
        raise WireError(f"tree line: segments[{i}]: {error}") from error
    if len(line.token_ids) != len(line.logprobs):
        raise WireError(
            f"tree line: segments[{i}] has {len(line.token_ids)} token_ids and {len(line.logprobs)} logprobs"
        )
    return Segment(
        parent=line.parent,
        level=line.level,
        token_ids=_ids(f"segments[{i}].token_ids", line.token_ids),
        behavior_logprobs=_floats(line.logprobs),
        policy_version=version,
        stop=line.stop,
        mixed_context=line.mixed_context,
        inclusion=line.inclusion,
    )


def _ids(name: str, values: Sequence[int]) -> NDArray[np.int32]:
    try:
        return np.array(values, dtype=np.int32)
    except OverflowError as error:
        raise WireError(f"tree line: {name} has a number that is no token id: {error}") from error


def _floats(values: Sequence[float | None]) -> Float32:
    """[T] or [L], null as NaN; what is too large for a float32 becomes infinite, and is refused as such."""
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)
