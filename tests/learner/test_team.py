import time
from dataclasses import dataclass, field

import pytest

from tests.metrics.clock import FakeClock
from treepo_async.learner.control import Order
from treepo_async.learner.team import Team
from treepo_async.metrics.categories import RANK
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot


@dataclass
class Control:
    """Notes the orders."""

    orders: list = field(default_factory=list)

    def order(self, order, details=b""):
        self.orders.append(order)


def test_the_other_ranks_hear_of_rank_0_while_it_works_alone():
    control = Control()

    def work():
        time.sleep(0.3)
        return "done"

    assert Team(None, control, tick_s=0.02).keep_waiting(work) == "done"
    assert set(control.orders) == {Order.WAIT}
    assert len(control.orders) >= 3


def test_short_work_is_no_order_and_its_failure_is_rank_0s():
    control = Control()

    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        Team(None, control).keep_waiting(fail)
    assert control.orders == []


@dataclass
class Following:
    """Rank 0 as another rank hears it: after a while an order, which takes a while to carry out."""

    clock: FakeClock
    orders: list

    def receive(self):
        self.clock.passes(4)
        return self.orders.pop(0)


@dataclass
class Obedient:
    """A learner of which each order takes its time."""

    clock: FakeClock

    def score(self, sequences):
        self.clock.passes(2)

    def export(self, kind):
        self.clock.passes(1)
        return []


def test_the_time_of_a_rank_goes_into_orders_and_into_waiting_for_them():
    clock = FakeClock()
    orders = [(Order.SCORE, b"[[1, 2]]"), (Order.EXPORT, b'"weights"'), (Order.STOP, b"")]
    slot = Slot(SlotLedger(RANK, clock=clock), "rank-1")
    Team(Obedient(clock), Following(clock, orders)).follow(slot)
    reading = slot.ledger.read()
    assert {k: v for k, v in reading.seconds.items() if v} == {
        "wait_order": 12,
        "order": 2,
        "publish": 1,
    }
    assert reading.wall == 15
    rows, _ = slot.ledger.take_rows()
    named = [(row.name, row.args) for row in rows if row.name != "wait_order"]
    assert named == [("order", {"order": "SCORE"}), ("publish", {"order": "EXPORT"})]
