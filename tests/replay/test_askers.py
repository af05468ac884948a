import pytest

from treepo_async.replay import askers as module
from treepo_async.replay.askers import Asker, Askers
from treepo_async.wire.messages import AskBatch, AskLease

LEASE, BATCH = AskLease(wait_s=1.0), AskBatch(step=0, lineage=0, wait_s=1.0)


def asker(number, message=LEASE, peer=b"actor-0"):
    return Asker(peer, number, message, deadline=1.0)


def test_a_request_for_a_lease_that_was_answered_is_known_when_it_comes_again():
    askers = Askers()
    for number in (1, 2):
        askers.add(asker(number))
    askers.done(asker(1))
    assert askers.was_answered(b"actor-0", 1)
    assert not askers.was_answered(b"actor-0", 2)
    assert not askers.was_answered(b"actor-1", 1)
    assert askers.for_leases() == [asker(2)]


def test_a_request_for_a_batch_is_answered_as_often_as_it_comes():
    askers = Askers()
    askers.add(asker(1, BATCH))
    askers.done(asker(1, BATCH))
    assert not askers.was_answered(b"actor-0", 1)


def test_of_many_answers_the_newest_are_remembered(monkeypatch):
    monkeypatch.setattr(module, "MAX_ANSWERED", 2)
    askers = Askers()
    for number in (1, 2, 3):
        askers.done(asker(number))
    assert [askers.was_answered(b"actor-0", number) for number in (1, 2, 3)] == [False, True, True]


@pytest.mark.parametrize("message", [LEASE, BATCH])
def test_a_request_that_comes_again_while_it_waits_keeps_its_deadline(message):
    askers = Askers()
    askers.add(asker(1, message))
    askers.add(Asker(b"actor-0", 1, message, deadline=9.0))
    assert [a.deadline for a in askers.waiting.values()] == [1.0]


def test_of_too_many_requests_of_one_peer_the_oldest_is_sent_away(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 2)
    askers = Askers()
    askers.add(asker(1, peer=b"actor-1"))
    assert [askers.add(asker(number)) for number in (1, 2, 2)] == [None] * 3
    surplus = askers.add(asker(3))
    assert surplus == asker(1)
    askers.done(surplus)
    assert askers.add(asker(3)) is None
    askers.forget(b"actor-0")
    assert [askers.add(asker(number)) for number in (4, 5)] == [None] * 2
