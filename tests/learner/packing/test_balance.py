from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treepo_async.learner.packing.balance import MOST_EVENED, SLACK, Item, balance, best_fit, deal


def item_lists(max_size=30):
    item = st.builds(
        Item,
        tokens=st.integers(1, 60),
        cost=st.floats(0.01, 100, allow_nan=False),
        group=st.integers(0, 8),
    )
    return st.lists(item, max_size=max_size)


def cost_of(items, chosen):
    return sum(items[i].cost for i in chosen)


def replica_costs(items, plan):
    return [sum(cost_of(items, chosen) for chosen in hand) for hand in plan]


@given(
    items=item_lists(),
    num_replicas=st.integers(1, 5),
    num_stages=st.integers(1, 5),
    budget=st.integers(1, 150),
)
@settings(max_examples=200, deadline=None)
def test_every_item_is_planned_once_within_the_budget_and_all_replicas_have_equally_many_microbatches(
    items, num_replicas, num_stages, budget
):
    wanted = {"num_replicas": num_replicas, "num_stages": num_stages, "budget_tokens": budget}
    plan = balance(items, **wanted)
    assert len(plan) == num_replicas
    (num_each,) = {len(hand) for hand in plan}
    assert num_each >= 1
    assert sorted(i for hand in plan for chosen in hand for i in chosen) == list(range(len(items)))
    for hand in plan:
        for chosen in hand:
            assert len(chosen) <= 1 or sum(items[i].tokens for i in chosen) <= budget
    largest_hand = max(sum(map(len, hand)) for hand in plan)
    assert num_each >= min(num_stages, largest_hand)
    assert balance(items, **wanted) == plan


@given(items=item_lists(max_size=40), num_replicas=st.integers(2, 6))
@settings(max_examples=200, deadline=None)
def test_no_item_moved_and_no_two_exchanged_would_even_out_two_replicas_further(
    items, num_replicas
):
    hands = deal(items, num_replicas)
    slack = SLACK * cost_of(items, range(len(items))) / num_replicas * 1.001
    for high, low in product(hands, repeat=2):
        gap = cost_of(items, high) - cost_of(items, low)
        for given_away, taken in product(high, [*low, None]):
            moved = items[given_away].cost - (0 if taken is None else items[taken].cost)
            assert min(moved, gap - moved) <= slack


@pytest.mark.parametrize("num_replicas", [2, 4, 7])
def test_many_small_items_make_replicas_of_equal_cost(num_replicas):
    items = [Item(1, 5 + (37 * i) % 11, i // 3) for i in range(40 * num_replicas)]
    costs = replica_costs(items, balance(items, num_replicas=num_replicas, budget_tokens=10))
    assert max(costs) <= 1.02 * sum(costs) / num_replicas


def test_groups_stay_on_one_replica_where_that_costs_nothing():
    items = [Item(1, 1.0, group) for group in range(6) for _ in range(5)]
    for hand in deal(items, 3):
        assert len({items[i].group for i in hand}) == 2


def test_a_group_is_spread_where_one_replica_would_have_all_the_work():
    items = [Item(1, 1.0, 0) for _ in range(8)]
    assert [len(hand) for hand in deal(items, 4)] == [2, 2, 2, 2]


def test_the_largest_items_find_room_first_and_fill_the_fullest_bin():
    items = [Item(size, 1.0) for size in (3, 5, 7, 2, 6)]
    assert best_fit(items, range(5), 10) == [[2, 0], [4, 3], [1]]


def test_items_are_spread_over_the_stages_before_a_microbatch_is_left_empty():
    items = [Item(1, cost) for cost in (10.0, 1.0, 1.0, 1.0)]
    (hand,) = balance(items, num_replicas=1, num_stages=4, budget_tokens=100)
    assert sorted(map(len, hand)) == [1, 1, 1, 1]
    (hand,) = balance(items[:2], num_replicas=1, num_stages=4, budget_tokens=100)
    assert sorted(map(len, hand)) == [1, 1], "an empty microbatch would shorten nothing"


def test_microbatches_of_a_replica_cost_about_the_same():
    items = [Item(10, float(1 + i % 5)) for i in range(40)]
    (hand,) = balance(items, num_replicas=1, num_stages=4, budget_tokens=100)
    costs = [cost_of(items, chosen) for chosen in hand]
    assert len(costs) == 4
    assert max(costs) - min(costs) <= 2 * SLACK * sum(costs) / 4 + 1


def test_very_many_microbatches_are_filled_and_left_so_and_fewer_are_evened_out():
    def filled(number):
        items = [Item(10, float(i % 7)) for i in range(10 * number)]
        (hand,) = balance(items, num_replicas=1, budget_tokens=100)
        assert len(hand) == number
        return hand == best_fit(items, range(len(items)), 100)

    assert filled(MOST_EVENED + 1)
    assert not filled(MOST_EVENED)


def test_without_items_every_replica_has_one_empty_microbatch():
    assert balance([], num_replicas=3, num_stages=2, budget_tokens=10) == [[[]]] * 3
