"""How a batch of trees is divided over data-parallel replicas and microbatches: made once, on rank 0.

Neighbours: `team` calls it, `share` is what it makes. Pure Python and numpy.

Invariant: every counted trajectory is in exactly one piece of exactly one replica, and all replicas have equally many
microbatches, as the pipeline schedule demands; what is short is an empty microbatch, which trains nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from treepo_async.learner.pack import next_fit
from treepo_async.learner.piece import Piece, counted_leaves
from treepo_async.learner.share import Share
from treepo_async.types import Tree


def divide(batch: Share, *, num_replicas: int, budget_tokens: int) -> list[Share]:
    """Group the counted trajectories of a batch into microbatches and deal these out to the replicas.

    Args:
        batch: all trees of an update; its own microbatches are not read.
        num_replicas: data-parallel size.
        budget_tokens: most tokens of a microbatch; a single trajectory that is longer gets one of its own.

    Returns:
        One share per replica.
    """
    pieces = [Piece(i, counted_leaves(a)) for i, a in enumerate(batch.advantages)]
    pieces = [piece for piece in pieces if piece.leaves]
    sizes = [num_piece_tokens(batch.trees[p.tree], p) for p in pieces]
    microbatches = [[pieces[i] for i in group] for group in next_fit(sizes, budget_tokens)]
    num_each = max(1, -(-len(microbatches) // num_replicas))
    return [
        _part(batch, microbatches[replica::num_replicas], num_each)
        for replica in range(num_replicas)
    ]


def num_piece_tokens(tree: Tree, piece: Piece) -> int:
    """Tokens that a piece takes: the prompt, and every segment on its paths once."""
    chosen = {i for leaf in piece.leaves for i in tree.path(tree.leaves[leaf])}
    return len(tree.prompt.token_ids) + sum(len(tree.segments[i]) for i in chosen)


def _part(batch: Share, microbatches: Sequence[Sequence[Piece]], num_microbatches: int) -> Share:
    """Some microbatches of a batch with the trees they need, filled up to a number of microbatches."""
    chosen = sorted({piece.tree for pieces in microbatches for piece in pieces})
    place = {tree: i for i, tree in enumerate(chosen)}
    moved = [tuple(replace(p, tree=place[p.tree]) for p in pieces) for pieces in microbatches]

    def take(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in chosen) if values else ()

    return Share(
        trees=take(batch.trees),
        advantages=take(batch.advantages),
        weights=take(batch.weights),
        microbatches=(*moved, *[()] * (num_microbatches - len(moved))),
        proximal=take(batch.proximal),
        reference=take(batch.reference),
        bounds=batch.bounds,
    )
