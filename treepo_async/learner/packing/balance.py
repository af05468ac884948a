"""Items of known size and cost, dealt to replicas and put into microbatches of a bounded size.

Neighbours: `divide` makes an item of every piece. Pure Python and numpy; the same items always give the same plan.

Invariant: every item is in exactly one microbatch, and all replicas have equally many.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Plan = list[list[list[int]]]
"""Per replica and microbatch, indices of items."""

SLACK = 0.01
"""Differences of cost that are not worth a move, as a share of the mean."""

MOST_EVENED = 64
"""Microbatches of a replica that are evened out. Where there are more, a pipeline waits little for the costliest."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is computed in one microbatch."""

    tokens: int
    cost: float
    """In any unit."""
    group: int = 0
    """Items of a group are best kept on one replica."""


def balance(
    items: Sequence[Item], *, num_replicas: int, num_stages: int = 1, budget_tokens: int
) -> Plan:
    """Deal items to replicas of equal cost, and put those of each into as many microbatches as every other's.

    Args:
        items: any number.
        num_replicas: data-parallel size.
        num_stages: of the pipeline: a replica gets at least as many microbatches, if some replica has as many items.
        budget_tokens: most tokens of a microbatch; a larger item gets one of its own.
    """
    hands = deal(items, num_replicas)
    packed = [best_fit(items, hand, budget_tokens) for hand in hands]
    num_each = max(1, *map(len, packed), min(num_stages, max(map(len, hands))))
    plan = [[*bins, *_empty(num_each - len(bins))] for bins in packed]
    if num_each > MOST_EVENED:
        return plan
    return [_level(items, bins, budget_tokens) for bins in plan]


def deal(items: Sequence[Item], num_replicas: int) -> list[list[int]]:
    """Indices of the items of each replica, so that the costliest replica costs little.

    Groups go whole, the costliest first, to the replica that has least; then single items move or change places where
    that evens out more than `SLACK`.
    """
    groups: dict[int, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(item.group, []).append(index)
    costs = {name: sum(items[i].cost for i in group) for name, group in groups.items()}
    hands: list[list[int]] = _empty(num_replicas)
    loads = [0.0] * num_replicas
    for name in sorted(groups, key=lambda name: (-costs[name], name)):
        least = loads.index(min(loads))
        hands[least] += groups[name]
        loads[least] += costs[name]
    return _level(items, hands, None)


def best_fit(items: Sequence[Item], chosen: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Items in few bins: the largest first, each into the fullest bin that has room."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(chosen, key=lambda i: (-items[i].tokens, i)):
        size = items[index].tokens
        fitting = [(room, place) for place, room in enumerate(rooms) if room >= size]
        if fitting:
            _, place = min(fitting)
        else:
            place = len(bins)
            bins.append([])
            rooms.append(budget_tokens)
        bins[place].append(index)
        rooms[place] -= size
    return bins


def _level(
    items: Sequence[Item], bins: Sequence[Sequence[int]], budget_tokens: int | None
) -> list[list[int]]:
    """Move items, or let two change places, between bins of different cost, until no move is worth it.

    Every move lowers the sum of the squared costs by at least the square of the slack, so there are finitely many.

    Args:
        items: all items.
        bins: indices of the items of each.
        budget_tokens: most tokens of a bin that did not exceed it before; None: no bound.
    """
    found = [list(chosen) for chosen in bins]
    costs_B = np.array([sum(items[i].cost for i in chosen) for chosen in found])
    slack = SLACK * costs_B.mean()
    is_settled_BB = np.zeros((len(found), len(found)), np.bool_)
    while True:
        has_several_B = np.array([len(chosen) > 1 for chosen in found])
        is_open_BB = ~is_settled_BB & (has_several_B[:, None] | has_several_B)
        gap_BB = np.where(is_open_BB, costs_B[:, None] - costs_B, 0.0)
        high, low = np.unravel_index(gap_BB.argmax(), gap_BB.shape)
        if gap_BB[high, low] <= 2 * slack:
            return [sorted(chosen) for chosen in found]
        move = _best_move(items, found[high], found[low], slack, budget_tokens)
        if move is None:
            is_settled_BB[high, low] = True
            continue
        for place, chosen in zip((high, low), move, strict=True):
            found[place] = chosen
            costs_B[place] = sum(items[i].cost for i in chosen)
            is_settled_BB[place, :] = is_settled_BB[:, place] = False


def _best_move(
    items: Sequence[Item],
    high: Sequence[int],
    low: Sequence[int],
    slack: float,
    budget_tokens: int | None,
) -> tuple[list[int], list[int]] | None:
    """Both bins behind the move that evens their costs out best; None where none gains more than the slack.

    A move gives one item of `high` to `low`, for one of `low` or for nothing.
    """
    cost_H, size_H = _columns(items, high)
    cost_L, size_L = _columns(items, low)
    back_cost, back_size = np.append(cost_L, 0.0), np.append(size_L, 0)
    gap = cost_H.sum() - cost_L.sum()
    moved = cost_H[:, None] - back_cost
    # of the costlier bin's lead: what is given away, or what is left where that is less
    gain = np.minimum(moved, gap - moved)
    if budget_tokens is not None:
        grown = size_H[:, None] - back_size
        fits = (size_L.sum() + grown <= budget_tokens) & (size_H.sum() - grown <= budget_tokens)
        gain = np.where(fits, gain, -np.inf)
    if gain.max() <= slack:
        return None
    give, take = np.unravel_index(gain.argmax(), gain.shape)
    given, taken = high[give], low[take : take + 1]
    return (
        [*high[:give], *high[give + 1 :], *taken],
        [*low[:take], *low[take + 1 :], given],
    )


def _columns(items: Sequence[Item], chosen: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Costs and tokens."""
    costs = np.array([items[i].cost for i in chosen], np.float64)
    return costs, np.array([items[i].tokens for i in chosen], np.int64)


def _empty(number: int) -> list[list[int]]:
    return [[] for _ in range(number)]
