"""From `end` to the steps in which a CPU attends over a forest: blocks of queries, each with the keys of its path.

A step takes at most `BLOCK` consecutive queries. Its keys are the path of its first query (the tokens before it whose subtree is
still open, oldest first) and above them the block's own. They lie on a stack: in depth-first pre-order the keys that one step
needs and the next does not are at its top, so a pass copies each token onto the stack at most twice.

Invariants, from `k <= q < end[k]` with subtrees that contain each other or are apart:
* every query of a step sees every key of its path but the top `num_mixed`, whose subtrees close inside the block; for those and
  the block's own there is a mask.
* a step ends before more than `BLOCK` keys of its path have closed. So the masks and the pairs computed in vain are
  O(T * BLOCK), and a forest has at most 2 T / BLOCK steps, and one more for each run of lone tokens.
* a token that sees itself only, as padding does, is in no step: its attention is its own value.

Neighbours: `cascade` runs the steps. Pure numpy.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from treepo_async.errors import TreeError

BLOCK = 64
"""Most queries of a step: fewer make more calls, more make more masked pairs."""

Range = tuple[int, int]
"""Tokens from the first to before the second."""

Write = tuple[int, int, int]
"""A height, and the range of tokens that lies on the stack from there."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tokens whose subtrees close together: a segment, or a chain of them."""

    start: int
    stop: int
    end: int
    """Where the subtrees close."""


@dataclass(frozen=True, slots=True)
class Step:
    """Queries `start` to `stop`, the keys of their path, and above them their own."""

    start: int
    stop: int
    num_path: int
    """Keys of the path."""
    num_mixed: int
    """Those of them, at the top, that some but not all queries see."""
    mask: NDArray[np.bool_] | None
    """[stop - start, num_mixed + stop - start], which of the top keys each query sees. None: `num_mixed` is 0, and of the
    block's own keys each query sees itself and those before it."""
    pushes: tuple[Write, ...]
    """What makes the stack of the step before this step's."""
    returns: tuple[Write, ...]
    """What makes the stack of the step behind this step's."""

    @property
    def num_own(self) -> int:
        """Queries, and as many keys."""
        return self.stop - self.start

    @property
    def num_keys(self) -> int:
        """Keys of the path and their own."""
        return self.num_path + self.num_own


@dataclass(frozen=True, slots=True)
class Steps:
    """A forest as steps and lone tokens."""

    steps: tuple[Step, ...]
    lone: tuple[Range, ...]
    """Tokens that see themselves only."""

    @property
    def height(self) -> int:
        """Most keys of a step."""
        return max((step.num_keys for step in self.steps), default=0)


def divide(end: NDArray[np.int64], block: int = BLOCK) -> Steps:
    """Divide a forest into steps.

    Args:
        end: [T], query `q` sees key `k` exactly when `k <= q < end[k]`.
        block: most queries of a step.

    Raises:
        TreeError: the subtree of a token closes before it, behind the last token, or inside of another it began in.
    """
    closed_before = np.maximum.accumulate(np.concatenate([[0], end[:-1]]))
    index = np.arange(len(end))
    is_lone = (closed_before <= index) & (end == index + 1)
    runs = list(_runs(end))
    _check(runs, len(end))
    blocks = [
        taken
        for start, stop in _ranges(~is_lone)
        for taken in _blocks([run for run in runs if start <= run.start < stop], block)
    ]
    return Steps(tuple(_steps(end, blocks)), tuple(_ranges(is_lone)))


@dataclass(frozen=True, slots=True)
class _Block:
    """What a step takes: the runs of its path, of them those that close inside, and its own."""

    path: list[Run]
    mixed: list[Run]
    own: list[Run]


def _blocks(runs: Sequence[Run], block: int) -> Iterator[_Block]:
    """Divide consecutive runs, before the first of which every subtree has closed."""
    path: list[Run] = []
    pending = list(reversed(runs))
    while pending:
        own, mixed = _take(pending, path, block)
        yield _Block(path, mixed, own)
        path = [run for run in [*path, *own] if run.end > own[-1].stop]


def _steps(end: NDArray[np.int64], blocks: Sequence[_Block]) -> Iterator[Step]:
    stacks = [tuple(_merged([*block.path, *block.own])) for block in blocks]
    for block, before, stack, after in zip(
        blocks, [(), *stacks], stacks, [*stacks[1:], ()], strict=False
    ):
        yield Step(
            block.own[0].start,
            block.own[-1].stop,
            num_path=_count(block.path),
            num_mixed=_count(block.mixed),
            mask=_mask(end, block.mixed, block.own),
            pushes=tuple(_writes(before, stack)),
            returns=tuple(_writes(after, stack)),
        )


def _take(pending: list[Run], path: Sequence[Run], block: int) -> tuple[list[Run], list[Run]]:
    """Take a block's runs off the end of `pending`; gives them and the path's runs that close inside of it, deepest last."""
    own: list[Run] = []
    room, num_open, num_closed = block, len(path), 0
    while pending and room > 0:
        run = pending[-1]
        still = num_open
        while still > 0 and path[still - 1].end <= run.start:
            still -= 1
            num_closed += path[still].stop - path[still].start
        if own and num_closed > block:
            break
        num_open = still
        pending.pop()
        middle = min(run.stop, run.start + room)
        own.append(Run(run.start, middle, run.end))
        room -= middle - run.start
        if middle < run.stop:
            pending.append(Run(middle, run.stop, run.end))
    return own, list(path[num_open:])


def _writes(before: Sequence[Range], after: Sequence[Range]) -> Iterator[Write]:
    """What makes one stack the other: all that lies above the keys at the bottom that they share."""
    height, shared = 0, True
    for i, (start, stop) in enumerate(after):
        kept = 0
        if shared and i < len(before) and before[i][0] == start:
            kept = min(stop, before[i][1]) - start
        shared = shared and i < len(before) and before[i] == (start, stop)
        if start + kept < stop:
            yield height + kept, start + kept, stop
        height += stop - start


def _count(runs: Sequence[Run]) -> int:
    return sum(run.stop - run.start for run in runs)


def _mask(
    end: NDArray[np.int64], mixed: Sequence[Run], own: Sequence[Run]
) -> NDArray[np.bool_] | None:
    """Which of the mixed keys and their own the queries of a block see; see `Step.mask`."""
    start, stop = own[0].start, own[-1].stop
    if not mixed and all(run.end >= stop for run in own):
        return None
    keys = np.concatenate([np.arange(run.start, run.stop) for run in [*mixed, *own]])
    queries = np.arange(start, stop)[:, None]
    return (keys <= queries) & (queries < end[keys])


def _runs(end: NDArray[np.int64]) -> Iterator[Run]:
    cuts = np.flatnonzero(np.diff(end)) + 1
    bounds = [0, *cuts.tolist(), len(end)] if len(end) else []
    for start, stop in pairwise(bounds):
        yield Run(start, stop, int(end[start]))


def _check(runs: Sequence[Run], num_tokens: int) -> None:
    path: list[Run] = []
    for run in runs:
        while path and path[-1].end <= run.start:
            path.pop()
        limit = path[-1].end if path else num_tokens
        if not run.stop <= run.end <= limit:
            raise TreeError(
                f"end is {run.end} for the tokens {run.start} to {run.stop - 1}; "
                f"it must lie from {run.stop} to {limit}, where the subtree around them ends"
            )
        path.append(run)


def _ranges(chosen: NDArray[np.bool_]) -> list[Range]:
    """Maximal ranges of chosen tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    starts, stops = edges[::2].tolist(), edges[1::2].tolist()
    return list(zip(starts, stops, strict=True))


def _merged(runs: Sequence[Run]) -> Iterator[Range]:
    """The same tokens in as few ranges as there can be."""
    start, stop = runs[0].start, runs[0].stop
    for run in runs[1:]:
        if run.start != stop:
            yield start, stop
            start = run.start
        stop = run.stop
    yield start, stop
