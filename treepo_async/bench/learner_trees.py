"""Trees to train on: made ones of a given branching, those of a file, and trajectories padded to one length.

Neighbours: `learner_cells` says which, `learner` trains on them. Made trees are the same for the same cell. Reads `wire` only for a file.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from treepo_async.bench.learner_cells import Branching, LearnerCell
from treepo_async.types import (
    ROOT,
    PolicyVersion,
    Prompt,
    Provenance,
    Sampling,
    Segment,
    StopReason,
    Tree,
    leaves_of,
)

EARLY_STOP = 0.1
"""Of the branching `treepo`: share of the paths that end at a level, ..."""
FIRST_STOP = 2
"""... from this one on."""
_VERSION = PolicyVersion(0, 0)


def trees_of(cell: LearnerCell, vocab_size: int) -> list[Tree]:
    """The trees of an update.

    Args:
        cell: which.
        vocab_size: of the model.

    Raises:
        ConfigError: the file does not exist or is none of trees.
        DataError: it is damaged, or its token ids are outside the vocabulary.
    """
    if cell.branching is Branching.FILE:
        # here, because a machine that only measures made trees has no msgspec
        from treepo_async.wire.tree_file import TreeFile

        file = TreeFile(Path(cell.trees), vocab_size=vocab_size)
        return [file.tree(i) for i in range(min(cell.prompts, len(file)))]
    return [_make(cell, vocab_size, seed) for seed in range(cell.prompts)]


def lengths_of(trees: Iterable[Tree]) -> list[int]:
    """Tokens of each trajectory, its prompt included."""
    return [
        len(tree.prompt.token_ids) + int(number) for tree in trees for number in tree.num_tokens_L
    ]


def padded(trees: Iterable[Tree]) -> list[Tree]:
    """Every trajectory as a tree of its own, its prompt lengthened in front until all are as long as the longest.

    Padding in front costs what padding behind does under a causal mask, and none of it is trained.
    """
    rows = [_row(tree, leaf) for tree in trees for leaf in range(len(tree.leaves))]
    longest = max(map(_num_tokens, rows))
    return [_lengthened(row, longest - _num_tokens(row)) for row in rows]


def _make(cell: LearnerCell, vocab_size: int, seed: int) -> Tree:
    shape, tokens = random.Random(seed), np.random.default_rng(seed)
    make = _treepo if cell.branching is Branching.TREEPO else _regular
    segments = tuple(
        Segment(
            parent=parent,
            level=level,
            token_ids=tokens.integers(1, vocab_size, length, dtype=np.int32),
            behavior_logprobs=-tokens.exponential(1.0, length).astype(np.float32),
            policy_version=_VERSION,
            stop=stop,
        )
        for parent, level, length, stop in make(cell, shape)
    )
    rewards_L = tokens.integers(0, 2, len(leaves_of(segments))).astype(np.float32)
    return Tree(
        prompt=Prompt(
            id=str(seed),
            token_ids=tokens.integers(1, vocab_size, cell.prompt, dtype=np.int32),
            text="",
            answer="",
        ),
        segments=segments,
        rewards_L=rewards_L,
        accuracies_L=rewards_L.copy(),
        sampling=Sampling(1.0, cell.segment, cell.depth, cell.width, 2),
        provenance=Provenance("bench", "bench"),
    )


_Outline = list[tuple[int, int, int, StopReason | None]]
"""Per segment: parent, level, length and why the path ended."""


def fork_levels(branching: str, width: int, depth: int) -> list[int]:
    """Levels whose paths are twice as many as those before; `width` is a power of 2."""
    number = width.bit_length() - 1
    if branching == Branching.EARLY:
        return list(range(number))
    if branching == Branching.LATE:
        return list(range(depth - number, depth))
    return [round(level) for level in np.linspace(0, depth - 1, number).tolist()]


def _regular(cell: LearnerCell, _: random.Random) -> _Outline:
    forks = fork_levels(cell.branching, cell.width, cell.depth)
    outline: _Outline = []
    live = [ROOT]
    for level in range(cell.depth):
        stop = StopReason.LENGTH if level == cell.depth - 1 else None
        parents = [parent for parent in live for _ in range(2 if level in forks else 1)]
        live = list(range(len(outline), len(outline) + len(parents)))
        outline += [(parent, level, cell.segment, stop) for parent in parents]
    return outline


def _treepo(cell: LearnerCell, rng: random.Random) -> _Outline:
    outline: _Outline = []
    live, num_ended = [ROOT], 0
    for level in range(cell.depth):
        is_last = level == cell.depth - 1
        room = max(len(live), min(2 * len(live), cell.width - num_ended))
        twice = set(rng.sample(live, room - len(live)))
        parents = [parent for parent in live for _ in range(2 if parent in twice else 1)]
        live = []
        for parent in parents:
            ends = is_last or (level >= FIRST_STOP and rng.random() < EARLY_STOP)
            length = rng.randint(1, cell.segment) if ends else cell.segment
            outline.append((parent, level, length, StopReason.EOS if ends else None))
            num_ended += ends
            if not ends:
                live.append(len(outline) - 1)
        if not live:
            break
    return outline


def _row(tree: Tree, leaf: int) -> Tree:
    """A trajectory as a tree of one path."""
    path = tree.path(tree.leaves[leaf])
    segments = tuple(replace(tree.segments[i], parent=place - 1) for place, i in enumerate(path))
    chosen = slice(leaf, leaf + 1)
    return replace(
        tree,
        segments=segments,
        rewards_L=tree.rewards_L[chosen],
        accuracies_L=tree.accuracies_L[chosen],
    )


def _lengthened(row: Tree, number: int) -> Tree:
    token_ids = np.concatenate([np.zeros(number, np.int32), row.prompt.token_ids])
    return replace(row, prompt=replace(row.prompt, token_ids=token_ids))


def _num_tokens(row: Tree) -> int:
    return len(row.prompt.token_ids) + row.num_tokens


def leaf_values(trees: Sequence[Tree]) -> list[np.ndarray]:
    """Advantages of the trajectories: some of either sign, none left out."""
    rng = np.random.default_rng(0)
    return [rng.normal(size=len(tree.leaves)) for tree in trees]
