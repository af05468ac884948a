"""The forms of a tree file's lines: whole trees, or a line for each trajectory; and lines as rows of a table.

The lines of a tree stand together, so a file can be gone on with from whole trees whatever its form: see `key_of`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from treepo_async.errors import WireError
from treepo_async.types import StopReason, Trajectory, Tree
from treepo_async.wire.tree_line import FORMAT, Decode, TreeLine, encode_line, shortest

FLOAT32_FIELDS = ("logprobs", "rewards", "accuracies", "reward", "accuracy")
"""Fields whose numbers are float32s, at any depth."""


class TrajectoryLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A path of a tree; the lines of a tree stand together, in the order of its leaves."""

    format: int
    prompt_id: str
    leaf: int
    num_leaves: int
    prompt: str
    answer: str
    response: str
    reward: float | None
    accuracy: float | None
    stop: StopReason
    temperature: float
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]


class LineKey(msgspec.Struct, frozen=True):
    """What a line is of, whatever its form."""

    prompt_id: str
    leaf: int | None = None
    """None for a whole tree."""
    num_leaves: int = 1

    @property
    def is_last(self) -> bool:
        """Whether its tree is complete with it."""
        return self.leaf is None or self.leaf == self.num_leaves - 1


class Form(NamedTuple):
    """What the lines of a file are."""

    line: type[msgspec.Struct]
    encode: Callable[[Tree, Decode], list[bytes]]
    """The lines of a tree, without line ends."""


_encoder = msgspec.json.Encoder()
_key_decoder = msgspec.json.Decoder(LineKey)


def encode_trajectories(tree: Tree, decode: Decode) -> list[bytes]:
    """The trajectories of a tree as lines, without line ends; a pruned one has neither reward nor accuracy."""
    prompt, num_leaves = tree.prompt, len(tree.leaves)
    rewards, accuracies = shortest(tree.rewards_L), shortest(tree.accuracies_L)
    lines = []
    for leaf in range(num_leaves):
        trajectory = Trajectory(tree, leaf)
        path = tree.path(tree.leaves[leaf])
        assert trajectory.stop is not None, "a leaf has ended"
        line = TrajectoryLine(
            format=FORMAT,
            prompt_id=prompt.id,
            leaf=leaf,
            num_leaves=num_leaves,
            prompt=prompt.text,
            answer=prompt.answer,
            response=decode(trajectory.token_ids.tolist()),
            reward=rewards[leaf],
            accuracy=accuracies[leaf],
            stop=trajectory.stop,
            temperature=tree.sampling.temperature,
            prompt_token_ids=prompt.token_ids.tolist(),
            token_ids=trajectory.token_ids.tolist(),
            logprobs=shortest(np.concatenate([tree.segments[i].behavior_logprobs for i in path])),
        )
        lines.append(_encoder.encode(line))
    return lines


FORMS = {
    "trees": Form(TreeLine, lambda tree, decode: [encode_line(tree, decode)]),
    "trajectories": Form(TrajectoryLine, encode_trajectories),
}


def key_of(line: bytes) -> LineKey:
    """What a line is of; looks at no more than that.

    Raises:
        WireError: the line is no JSON object with these fields.
    """
    try:
        return _key_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"no line of a tree file: {error}") from error


def line_of_row(row: Mapping[str, Any], form: Form) -> bytes:
    """The line whose fields a table's row has, as it was written first: its float32s are shortest decimals again.

    Raises:
        WireError: the row has other fields.
    """
    try:
        return _encoder.encode(msgspec.convert(_shortened(row), form.line))
    except msgspec.ValidationError as error:
        raise WireError(f"table row: {error}") from error


def fields_of_line(line: bytes, form: Form) -> dict[str, Any]:
    """The fields of a line, for a table's row.

    Raises:
        WireError: the line has other fields.
    """
    try:
        found: dict[str, Any] = msgspec.to_builtins(msgspec.json.decode(line, type=form.line))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"tree line: {error}") from error
    return found


def _shortened(value: Any, *, is_float32: bool = False) -> Any:
    """The same value with float32s as their shortest decimals."""
    if isinstance(value, dict):
        return {k: _shortened(inner, is_float32=k in FLOAT32_FIELDS) for k, inner in value.items()}
    if isinstance(value, list) and is_float32:
        # a failed score is null in the row, NaN here, and null again in the line
        return shortest(np.array(value, np.float64).astype(np.float32))
    if isinstance(value, list):
        return [_shortened(inner) for inner in value]
    if isinstance(value, float) and is_float32:
        return shortest(np.array([value], np.float32))[0]
    return value
