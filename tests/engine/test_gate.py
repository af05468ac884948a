import asyncio
import contextlib
import time

import msgspec
import pytest
import zmq
import zmq.asyncio

import treepo_async.engine.gate
from tests.fakes import BASE, loopback, open_gate, running, until
from treepo_async.engine.gate import GateClient
from treepo_async.engine.gatekeeper import GateKeeper
from treepo_async.errors import ClosedError, DeadlineError
from treepo_async.metrics.categories import ACTOR
from treepo_async.metrics.ledger import SlotLedger
from treepo_async.metrics.slots import Slot
from treepo_async.types import PolicyVersion
from treepo_async.wire.messages import Evaluated, Join, Nack, decode
from treepo_async.wire.sockets import Requester

FIRST, SECOND, THIRD = (PolicyVersion(0, step) for step in (1, 2, 3))
EVENT_S = 5.0


@contextlib.asynccontextmanager
async def in_flight(gate, least_step=0):
    """A request under way; set the event to let it end. Gives the event and the versions it got."""
    end, versions = asyncio.Event(), []

    async def request():
        async with gate.passage(least_step) as version:
            versions.append(version)
            await end.wait()

    async with running(request()) as task:
        yield end, versions, task


async def test_a_request_gets_the_version_that_the_gate_is_open_for():
    async with open_gate(FIRST) as (keeper, gate):
        async with gate.passage() as version:
            assert version == FIRST
        await keeper.open(SECOND, evaluate=False, hold_s=0)
        async with gate.passage(least_step=2) as version:
            assert version == SECOND


async def test_nothing_passes_while_the_gate_is_closed():
    async with open_gate() as (keeper, gate):
        await keeper.close()
        assert await keeper.drained(timeout_s=EVENT_S)
        async with in_flight(gate) as (_, versions, _):
            await asyncio.sleep(0.3)
            assert versions == []
            await keeper.open(FIRST, evaluate=False, hold_s=0)
            await until(lambda: versions == [FIRST])


async def test_the_gate_is_drained_only_when_the_last_request_is_back():
    async with (
        open_gate() as (keeper, gate),
        in_flight(gate) as (end_one, one, _),
        in_flight(gate) as (end_two, two, _),
    ):
        await until(lambda: one and two)
        await keeper.close()
        assert not await keeper.drained(timeout_s=0.2)
        end_one.set()
        assert not await keeper.drained(timeout_s=0.2)
        end_two.set()
        assert await keeper.drained(timeout_s=EVENT_S)


async def test_a_word_of_an_earlier_closing_does_not_drain_a_later_one():
    async with open_gate() as (keeper, gate):
        await keeper.close()
        assert await keeper.drained(timeout_s=EVENT_S)
        await keeper.open(FIRST, evaluate=False, hold_s=0)
        async with in_flight(gate, least_step=1) as (end, versions, _):
            await until(lambda: versions)
            await keeper.close()
            assert not await keeper.drained(timeout_s=0.2)
            end.set()
            assert await keeper.drained(timeout_s=EVENT_S)


async def test_without_clients_the_gate_is_drained_at_once():
    keeper = GateKeeper(loopback())
    try:
        await keeper.close()
        assert await keeper.drained(timeout_s=0.1)
    finally:
        keeper.shut()


async def test_a_client_that_joins_a_closed_gate_counts_as_drained_once_it_knows():
    endpoint = loopback()
    keeper = GateKeeper(endpoint)
    try:
        async with running(keeper.serve()):
            await keeper.close()
            async with GateClient(endpoint, name="late", evaluates=False, timeout_s=5):
                await until(lambda: keeper._clients)
                assert await keeper.drained(timeout_s=EVENT_S)
    finally:
        keeper.shut()


async def test_a_client_that_has_fallen_silent_no_longer_counts():
    endpoint = loopback()
    keeper = GateKeeper(endpoint, silent_s=0.3)
    try:
        async with (
            running(keeper.serve()),
            Requester(endpoint, name="killed", owner="engine host") as killed,
        ):
            await keeper.open(BASE, evaluate=False, hold_s=0)
            await killed.ask(Join(name="killed"), timeout_s=5, wait="an answer to Join")
            begin = time.monotonic()
            await keeper.close()
            assert not await keeper.drained(timeout_s=0.1)
            assert await keeper.drained(timeout_s=EVENT_S)
            assert time.monotonic() - begin > 0.2
    finally:
        keeper.shut()


async def test_a_request_waits_for_its_least_step():
    async with (
        open_gate(FIRST) as (keeper, gate),
        in_flight(gate, least_step=3) as (_, versions, _),
    ):
        await keeper.open(SECOND, evaluate=False, hold_s=0)
        async with gate.passage(least_step=2):
            pass
        assert versions == []
        await keeper.open(THIRD, evaluate=False, hold_s=0)
        await until(lambda: versions == [THIRD])


async def test_a_gate_that_stays_closed_is_a_deadline_that_names_the_host_and_the_step():
    async with open_gate(FIRST, timeout_s=0.3) as (_, gate):
        with pytest.raises(
            DeadlineError,
            match=r"waited 0.3 s for the gate to open at policy step 4 or later \(it is at 0.1\); "
            "engine host should have ended it",
        ):
            async with gate.passage(least_step=4):
                pass


@contextlib.asynccontextmanager
async def two_clients():
    endpoint = loopback()
    keeper = GateKeeper(endpoint)
    evaluator = GateClient(endpoint, name="actor-0", evaluates=True, timeout_s=5)
    other = GateClient(endpoint, name="actor-1", evaluates=False, timeout_s=5)
    try:
        async with running(keeper.serve()), evaluator, other:
            await until(lambda: len(keeper._clients) == 2)
            yield keeper, evaluator, other
    finally:
        keeper.shut()


async def test_a_version_to_be_evaluated_reaches_the_evaluator_alone_and_once(monkeypatch):
    monkeypatch.setattr(treepo_async.engine.gate, "BEAT_S", 0.1)
    async with two_clients() as (keeper, evaluator, other):
        await keeper.open(FIRST, evaluate=True, hold_s=60)
        async with asyncio.timeout(EVENT_S):
            assert await evaluator.to_evaluate.get() == FIRST
            async with other.passage(least_step=1):
                pass
        # the next beats bring the same gate again
        await asyncio.sleep(0.35)
        assert evaluator.to_evaluate.empty()
        assert other.to_evaluate.empty()


async def test_a_version_is_held_until_it_is_evaluated():
    async with two_clients() as (keeper, evaluator, _):
        await keeper.open(FIRST, evaluate=True, hold_s=60)
        assert keeper.is_held()
        await evaluator.evaluated(BASE)
        await asyncio.sleep(0.2)
        assert keeper.is_held(), "another version was evaluated"
        await evaluator.evaluated(FIRST)
        await until(lambda: not keeper.is_held())


async def test_a_word_of_an_evaluation_that_was_lost_is_said_again(monkeypatch):
    monkeypatch.setattr(treepo_async.engine.gate, "BEAT_S", 0.05)
    async with two_clients() as (keeper, evaluator, _):
        await keeper.open(FIRST, evaluate=True, hold_s=60)
        assert await evaluator.to_evaluate.get() == FIRST
        tell, lost = evaluator._host.tell, []

        async def lose_once(message):
            if isinstance(message, Evaluated) and not lost:
                lost.append(message)
            else:
                await tell(message)

        evaluator._host.tell = lose_once
        await evaluator.evaluated(FIRST)
        await until(lambda: not keeper.is_held())
        assert len(lost) == 1


async def test_a_version_is_held_no_longer_than_its_deadline():
    async with two_clients() as (keeper, _, _):
        await keeper.open(FIRST, evaluate=True, hold_s=0.3)
        assert keeper.is_held()
        await until(lambda: not keeper.is_held(), timeout_s=2)


async def test_a_version_that_is_opened_again_stays_held_and_a_new_one_does_not():
    async with two_clients() as (keeper, _, _):
        await keeper.open(FIRST, evaluate=True, hold_s=60)
        await keeper.close()
        await keeper.open(FIRST, evaluate=False, hold_s=60)
        assert keeper.is_held()
        await keeper.open(SECOND, evaluate=False, hold_s=60)
        assert not keeper.is_held()


async def test_after_a_doubt_nothing_passes_until_the_host_has_answered_anew():
    async with open_gate(FIRST) as (keeper, gate):
        answer, held = keeper._router.send, asyncio.Event()

        async def hold(*arguments):
            await held.wait()
            return await answer(*arguments)

        keeper._router.send = hold
        gate.doubt()
        async with in_flight(gate) as (_, versions, _):
            await asyncio.sleep(0.2)
            assert versions == []
            held.set()
            await until(lambda: versions == [FIRST])


@contextlib.asynccontextmanager
async def host_at(endpoint, version, *, evaluate=False):
    """A host with an open gate, once the socket of whoever had the endpoint has let go of it."""
    async with asyncio.timeout(EVENT_S):
        while True:
            try:
                keeper = GateKeeper(endpoint)
                break
            except zmq.ZMQError:
                await asyncio.sleep(0.02)
    try:
        async with running(keeper.serve()):
            await keeper.open(version, evaluate=evaluate, hold_s=60)
            yield keeper
    finally:
        keeper.shut()


async def test_a_host_that_takes_the_place_of_a_dead_one_is_believed_whatever_its_version():
    endpoint = loopback()
    async with contextlib.AsyncExitStack() as stack:
        gate = GateClient(endpoint, name="a", evaluates=False, timeout_s=20)
        async with host_at(endpoint, THIRD) as keeper:
            await stack.enter_async_context(gate)
            for _ in range(3):
                await keeper.close()
                await keeper.open(THIRD, evaluate=False, hold_s=0)
            async with gate.passage() as version:
                assert version == THIRD
        gate.doubt()
        async with in_flight(gate) as (_, versions, _):
            await asyncio.sleep(0.1)
            assert versions == [], "nobody has said that there is a server"
            async with host_at(endpoint, FIRST):
                await until(lambda: versions == [FIRST])


async def test_a_new_host_does_not_wait_for_an_evaluation_that_was_made_under_the_old_one():
    endpoint = loopback()
    async with contextlib.AsyncExitStack() as stack:
        gate = GateClient(endpoint, name="actor-0", evaluates=True, timeout_s=20)
        async with host_at(endpoint, FIRST, evaluate=True) as keeper:
            await stack.enter_async_context(gate)
            assert await gate.to_evaluate.get() == FIRST
            await gate.evaluated(FIRST)
            await until(lambda: not keeper.is_held())
        async with host_at(endpoint, FIRST, evaluate=True) as keeper:
            assert keeper.is_held()
            await until(lambda: not keeper.is_held())
            assert gate.to_evaluate.empty()


async def test_a_message_that_cannot_be_read_is_refused_under_its_number():
    endpoint = loopback()
    keeper = GateKeeper(endpoint)
    peer = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    peer.setsockopt(zmq.LINGER, 0)
    try:
        async with running(keeper.serve()), asyncio.timeout(10):
            peer.connect(endpoint)
            await peer.send(msgspec.msgpack.encode({"type": "Join", "request": 7, "bogus": 1}))
            (frame,) = await peer.recv_multipart()
    finally:
        peer.close()
        keeper.shut()
    answer = decode(frame)
    assert isinstance(answer, Nack)
    assert (answer.request, answer.reason) == (7, "invalid")


async def test_a_request_before_a_closed_gate_has_its_slot_wait_for_weights():
    slot = Slot(SlotLedger(ACTOR), "slot-0")
    async with open_gate() as (keeper, gate):
        await keeper.close()
        assert await keeper.drained(timeout_s=EVENT_S)
        with slot.current(), slot("grow"):
            async with in_flight(gate) as (_, versions, _):
                await asyncio.sleep(0.2)
                closed = slot.ledger.read()
                await keeper.open(FIRST, evaluate=False, hold_s=0)
                await until(lambda: versions == [FIRST])
                begin = slot.ledger.read()
                await asyncio.sleep(0.2)
                flown = slot.ledger.read().since(begin)
    assert closed.seconds["gate"] > 0.1
    assert flown.seconds["gate"] == 0
    assert flown.seconds["grow"] == pytest.approx(flown.wall)


async def test_an_open_gate_keeps_no_slot_waiting():
    slot = Slot(SlotLedger(ACTOR), "slot-0")
    async with open_gate() as (_, gate):
        with slot.current(), slot("grow"):
            async with gate.passage():
                pass
    assert "gate" not in slot.ledger.read().seconds


async def test_a_request_that_another_engine_may_take_does_not_wait_for_a_server_that_is_down():
    async with open_gate() as (keeper, gate), asyncio.timeout(EVENT_S):
        await keeper.close()
        await until(lambda: not gate.status().is_open)

        async def patient():
            async with gate.passage(patience_s=60.0):
                pass

        asked = asyncio.ensure_future(patient())
        await asyncio.sleep(0.2)
        assert not asked.done(), "weights change"
        await keeper.close(is_down=True)
        with pytest.raises(ClosedError):
            await asked


async def test_the_patience_of_a_request_ends_before_the_deadline_of_the_gate():
    async with open_gate(timeout_s=60.0) as (keeper, gate), asyncio.timeout(EVENT_S):
        await keeper.close()
        await until(lambda: not gate.status().is_open)
        with pytest.raises(ClosedError, match=r"waited 0\.1 s for the gate to open"):
            async with gate.passage(patience_s=0.1):
                pass


async def test_a_doubt_counts_as_down_until_the_host_has_answered():
    async with open_gate() as (_, gate), asyncio.timeout(EVENT_S):
        gate.doubt()
        assert gate.status().is_down
        assert not gate.status().is_open
        await until(lambda: gate.status().is_open)
        assert not gate.status().is_down


async def test_a_client_that_has_other_engines_asks_for_a_host_without_end():
    endpoint = loopback()
    async with (
        GateClient(endpoint, name="a", evaluates=False, timeout_s=0.2, is_one_of_many=True) as gate,
        asyncio.timeout(20),
    ):
        await asyncio.sleep(0.6)
        assert gate.status().silent_s > 0.5
        keeper = GateKeeper(endpoint)
        try:
            async with running(keeper.serve()):
                await keeper.open(FIRST, evaluate=False, hold_s=0)
                await until(lambda: gate.status().is_open)
                assert gate.status().version == FIRST
        finally:
            keeper.shut()


async def test_the_hosts_load_is_told_with_every_beat():
    async with open_gate() as (keeper, gate):
        assert gate.status().num_in_flight == 0
        keeper.tell_load(5)
        await until(lambda: gate.status().num_in_flight == 5)
        await keeper.close()
        await until(lambda: not gate.status().is_open)
        assert gate.status().num_in_flight == 5
