import pytest

from tests.engine.broadcasts import parcel_of
from tests.fakes import loopback
from treepo_async.errors import DeadlineError, WeightsError, WireError
from treepo_async.learner.broadcast_desk import DeskThread
from treepo_async.types import PolicyVersion
from treepo_async.weights.desk import Desk
from treepo_async.wire.messages import AskWeights, Hello
from treepo_async.wire.sockets import BlockingRequester

FIRST = PolicyVersion(0, 1)


class Broken(Desk):
    """A desk with a fault in it."""

    def next_for(self, applied, **wish):
        raise LookupError("a fault")


def test_a_desk_whose_thread_has_ended_takes_no_offer_as_no_engine_would_hear_of_it():
    endpoint = loopback()
    desk = DeskThread(Broken("desk", num_stages=1, keep_marked=1), endpoint, run_id="run")
    host = BlockingRequester(
        endpoint, name="engine-0", owner="desk", hello=Hello(name="engine-0", run_id="run")
    )
    desk.offer(parcel_of(FIRST))
    desk.withdraw_old()
    with pytest.raises(DeadlineError):
        host.ask(AskWeights(engine="engine-0", lineage=0, step=0), timeout_s=0.5, wait="an offer")
    host.close()
    for use in (desk.withdraw_old, lambda: desk.offer(parcel_of(FIRST))):
        with pytest.raises(WeightsError, match=r"weights desk at tcp.* has ended.*a fault"):
            use()
    desk.close()


def test_an_endpoint_that_is_taken_is_told_at_once():
    endpoint = loopback()
    first = DeskThread(Desk("one", num_stages=1, keep_marked=1), endpoint, run_id="run")
    try:
        with pytest.raises(WireError, match=f"cannot use {endpoint}: Address already in use"):
            DeskThread(Desk("two", num_stages=1, keep_marked=1), endpoint, run_id="run")
    finally:
        first.close()
