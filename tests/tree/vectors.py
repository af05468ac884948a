"""Trees with known advantages (`advantage_vectors.json`), and trees that are the same but for cuts inside of levels."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from treepo_async.tree.cut import Run, VersionSpan, cut
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

_FILE = json.loads((Path(__file__).parent / "advantage_vectors.json").read_text())
TREES, BATCHES = _FILE["trees"], _FILE["batches"]
"""By name: `leaves`, or the names of the `trees`, and the `expected` values by estimator, `_whitened` where so."""
GRID = 4


def make_tree(leaves):
    """The tree whose leaves are described by the labels of their path, one label per grid level."""
    index, segments = {(): ROOT}, []
    for leaf in leaves:
        for level, num_tokens in enumerate(leaf["segment_tokens"]):
            node = tuple(leaf["path"][: level + 1])
            if node in index:
                continue
            index[node] = len(segments)
            segments.append(
                Segment(
                    parent=index[node[:-1]],
                    level=level,
                    token_ids=np.full(num_tokens, 7, np.int32),
                    behavior_logprobs=np.full(num_tokens, -1.0, np.float32),
                    policy_version=PolicyVersion(0, 0),
                    stop=StopReason.EOS if len(node) == len(leaf["path"]) else None,
                )
            )
    rewards_L = np.array([leaf["reward"] for leaf in leaves], np.float32)
    tree = Tree(
        prompt=Prompt("p", np.array([1], np.int32), "", ""),
        segments=tuple(segments),
        rewards_L=rewards_L,
        accuracies_L=rewards_L,
        sampling=Sampling(1.0, GRID, 8, len(leaves), 2),
        provenance=Provenance("lease", "actor"),
    )
    tree.check()
    return tree


def vector(name):
    """A tree of `TREES`."""
    return make_tree(TREES[name]["leaves"])


def expected_rows(rows):
    """Values per leaf, or per leaf and level, as the array that they stand for."""
    if not isinstance(rows[0], list):
        return np.array(rows)
    depth = max(len(row) for row in rows)
    return np.array([row + [np.nan] * (depth - len(row)) for row in rows])


def recut(tree, rng):
    """The same tree after weights changed at random tokens of its segments."""
    moved, starts, segments = {ROOT: ROOT}, {ROOT: 0}, []
    for i, segment in enumerate(tree.segments):
        spans, left = [], len(segment)
        while left > 0:
            spans.append(
                VersionSpan(PolicyVersion(0, 9 + len(spans)), int(rng.integers(1, left + 1)))
            )
            left -= spans[-1].num_tokens
        segments += cut(
            Run(segment.token_ids, segment.behavior_logprobs, tuple(spans)),
            parent=moved[segment.parent],
            first_index=len(segments),
            start=starts[segment.parent],
            segment_tokens=tree.sampling.segment_tokens,
            stop=segment.stop,
        )
        # a path is judged at its end, so the chance to go on stays with the last piece
        segments[-1] = replace(segments[-1], inclusion=segment.inclusion)
        moved[i], starts[i] = len(segments) - 1, starts[segment.parent] + len(segment)
    result = replace(tree, segments=tuple(segments))
    result.check()
    return result


def coarsened(tree):
    """The same tree on a grid of twice the segment length: every second level is no level any more."""
    return replace(
        tree,
        segments=tuple(replace(segment, level=segment.level // 2) for segment in tree.segments),
        sampling=replace(tree.sampling, segment_tokens=2 * tree.sampling.segment_tokens),
    )
