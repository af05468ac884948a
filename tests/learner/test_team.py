import time
from dataclasses import dataclass, field

import pytest

from treepo_async.learner import team
from treepo_async.learner.control import Order
from treepo_async.learner.team import Team


@dataclass
class Control:
    """Notes the orders."""

    orders: list = field(default_factory=list)

    def order(self, order, details=b""):
        self.orders.append(order)


def test_the_other_ranks_hear_of_rank_0_while_it_works_alone(monkeypatch):
    monkeypatch.setattr(team, "TICK_S", 0.02)
    control = Control()

    def work():
        time.sleep(0.3)
        return "done"

    assert Team(None, control).keep_waiting(work) == "done"
    assert set(control.orders) == {Order.WAIT}
    assert len(control.orders) >= 3


def test_short_work_is_no_order_and_its_failure_is_rank_0s():
    control = Control()

    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        Team(None, control).keep_waiting(fail)
    assert control.orders == []
