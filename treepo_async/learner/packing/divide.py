"""How a batch of trees is divided over data-parallel replicas and microbatches: made once, on rank 0.

Every tree is cut into pieces, the pieces are dealt to the replicas and filled into microbatches. Neighbours: `split` cuts, `cost` weighs,
`balance` deals and fills; `team` calls it, `share` is what it makes. Pure Python and numpy.

Invariant: every counted trajectory is in exactly one piece of exactly one replica, and all replicas have equally many
microbatches, as the pipeline schedule demands; what is short is an empty microbatch, which trains nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from treepo_async.config.schema import PACKINGS
from treepo_async.errors import ConfigError
from treepo_async.learner.packing.balance import SLACK, Item, Plan, balance
from treepo_async.learner.packing.cost import CostModel, load_of
from treepo_async.learner.packing.piece import Piece, counted_leaves
from treepo_async.learner.packing.share import Share
from treepo_async.learner.packing.split import Row, row_of, split

MOST_HALVINGS = 3
"""How often the largest piece is halved in search of a shorter update."""


def divide(
    batch: Share,
    *,
    num_replicas: int,
    budget_tokens: int,
    num_stages: int = 1,
    packing: str = "tree",
    cost: CostModel | None = None,
) -> list[Share]:
    """Group the counted trajectories of a batch into microbatches and deal these out to the replicas.

    Trees are cut as little as the budget allows; smaller pieces, which compute more tokens twice, are tried too and taken
    where the replicas are evened out so much better that the update is shorter.

    Args:
        batch: all trees of an update; its own microbatches are not read.
        num_replicas: data-parallel size.
        budget_tokens: most tokens of a microbatch; a single trajectory that is longer gets one of its own.
        num_stages: of the pipeline: a replica has at least as many microbatches, where there are pieces enough.
        packing: `tree`: trajectories of a tree are computed together as far as the budget allows; `flat`: each by
            itself; `auto`: for every tree what costs less.
        cost: what replicas and microbatches are evened out by; None: tokens.

    Returns:
        One share per replica.

    Raises:
        ConfigError: the packing is unknown.
    """
    if packing not in PACKINGS:
        raise ConfigError(
            f"learner.packing={packing!r} is unknown; it is one of {', '.join(PACKINGS)}"
        )
    weigh = cost or CostModel()
    if packing != "auto":
        # where the packing is given, pieces that share less must not look cheaper for having fewer nodes
        weigh = replace(weigh, per_node=0.0)
    counted = [counted_leaves(values) for values in batch.advantages]
    rows = {i: row_of(batch.trees[i], leaves) for i, leaves in enumerate(counted) if leaves}

    @cache
    def weighed(piece: Piece) -> Item:
        load = load_of(batch.trees[piece.tree], piece.leaves)
        return Item(load.tokens, weigh.cost(load), piece.tree)

    def draft(piece_tokens: int) -> _Draft:
        pieces = [
            piece
            for tree, row in rows.items()
            for piece in _cut(tree, row, piece_tokens, packing, weighed)
        ]
        items = [weighed(piece) for piece in pieces]
        plan = balance(
            items, num_replicas=num_replicas, num_stages=num_stages, budget_tokens=budget_tokens
        )
        return _Draft(pieces, items, plan)

    best = draft(budget_tokens)
    largest = min(budget_tokens, max((item.tokens for item in best.items), default=0))
    if packing != "flat" and num_replicas * num_stages > 1:
        for halvings in range(1, MOST_HALVINGS + 1):
            finer = draft(largest >> halvings)
            if finer.time(num_stages) < (1 - SLACK) * best.time(num_stages):
                best = finer
    return [_part(batch, microbatches) for microbatches in best.microbatches()]


@dataclass(frozen=True, slots=True)
class _Draft:
    """Pieces, what they weigh, and where they would go."""

    pieces: Sequence[Piece]
    items: Sequence[Item]
    plan: Plan

    def time(self, num_stages: int) -> float:
        """Of the slowest replica: a pipeline is filled and drained at the pace of its costliest microbatch."""
        costs = [[sum(self.items[i].cost for i in chosen) for chosen in hand] for hand in self.plan]
        return max(sum(hand) + (num_stages - 1) * max(hand) for hand in costs)

    def microbatches(self) -> list[list[list[Piece]]]:
        """The pieces of each replica's microbatches, those of one tree that met again joined."""
        packed = {piece.tree for piece in self.pieces if len(piece.leaves) > 1}
        return [
            [_join([self.pieces[i] for i in chosen], packed) for chosen in hand]
            for hand in self.plan
        ]


def _join(pieces: Sequence[Piece], joined: set[int]) -> list[Piece]:
    """One piece for each of some trees, so that what its pieces share is computed once; those of other trees as they are."""
    found: list[Piece] = []
    place: dict[int, int] = {}
    for piece in pieces:
        at = place.setdefault(piece.tree, len(found))
        if piece.tree in joined and at < len(found):
            found[at] = replace(piece, leaves=(*found[at].leaves, *piece.leaves))
        else:
            found.append(piece)
    return found


def _cut(
    tree: int,
    row: Row,
    piece_tokens: int,
    packing: str,
    weighed: Callable[[Piece], Item],
) -> list[Piece]:
    """The pieces of a tree.

    Args:
        tree: its index.
        row: its counted leaves.
        piece_tokens: most tokens of a piece of more than one leaf.
        packing: one of `PACKINGS`.
        weighed: what `auto` compares.
    """
    flat = [Piece(tree, (leaf,)) for leaf in row.leaves]
    if packing == "flat":
        return flat
    together = [Piece(tree, leaves) for leaves in split(row, piece_tokens)]
    if packing == "tree":
        return together
    return min((together, flat), key=lambda pieces: sum(weighed(p).cost for p in pieces))


def _part(batch: Share, microbatches: Sequence[Sequence[Piece]]) -> Share:
    """Some microbatches of a batch, with the trees they need and what is known of them."""
    chosen = sorted({piece.tree for pieces in microbatches for piece in pieces})
    place = {tree: i for i, tree in enumerate(chosen)}

    def take(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in chosen)

    return Share(
        trees=take(batch.trees),
        advantages=take(batch.advantages),
        weights=take(batch.weights),
        microbatches=tuple(
            tuple(replace(piece, tree=place[piece.tree]) for piece in pieces)
            for pieces in microbatches
        ),
        proximal=None if batch.proximal is None else take(batch.proximal),
        reference=None if batch.reference is None else take(batch.reference),
        bounds=batch.bounds,
    )
