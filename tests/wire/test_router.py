import asyncio
import time

import pytest
import zmq
import zmq.asyncio

from treepo_async.process import free_ports
from treepo_async.wire.messages import MAX_MESSAGE_BYTES, Ack, Beat, Hello, decode, encode
from treepo_async.wire.options import COPY_BYTES, MAX_ANSWERS
from treepo_async.wire.sockets import Requester, Router

HELLO = Hello(name="actor-0", run_id="run")


@pytest.fixture
def endpoint():
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
async def router(endpoint):
    router = Router(endpoint, max_bytes=2**20)
    yield router
    router.close()


@pytest.fixture
def peer(endpoint):
    """A bare socket, which sends what it likes."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(endpoint)
    yield socket
    socket.close(linger=0)


async def taken(router, number):
    """Messages until there are so many, or a deadline."""
    found = []
    async with asyncio.timeout(10):
        while len(found) < number:
            found += await router.receive_some(limit=number, timeout_s=1.0)
    return found


async def test_what_is_there_is_taken_at_once_and_in_order_up_to_the_limit(router, peer):
    for i in range(10):
        peer.send(encode(Beat(leases=[str(i)])))
    found = await taken(router, 1)
    await asyncio.sleep(0.1)
    found += await router.receive_some(limit=5, timeout_s=10)
    assert len(found) == 6
    found += await router.receive_some(limit=100, timeout_s=10)
    assert [decode(frames[0]).leases for _, frames in found] == [[str(i)] for i in range(10)]


async def test_nothing_is_there_at_the_deadline(router):
    begin = time.monotonic()
    assert await router.receive_some(limit=5, timeout_s=0.2) == []
    assert time.monotonic() - begin >= 0.2
    assert await router.receive_some(limit=5, timeout_s=0) == []


async def test_a_message_ends_the_wait_and_does_not_wait_for_the_deadline(router, peer):
    wait = asyncio.create_task(router.receive_some(limit=5, timeout_s=50))
    await asyncio.sleep(0.1)
    peer.send(encode(HELLO))
    ((_, frames),) = await asyncio.wait_for(wait, 10)
    assert decode(frames[0]) == HELLO


async def test_other_tasks_run_while_messages_keep_coming(router, peer):
    num_turns = 0

    async def work():
        nonlocal num_turns
        while True:
            num_turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(work())
    for _ in range(10):
        peer.send(encode(HELLO))
        await taken(router, 1)
    task.cancel()
    assert num_turns >= 10


async def test_a_cancelled_wait_loses_no_message(router, peer):
    for i in range(20):
        wait = asyncio.create_task(router.receive_some(limit=1, timeout_s=10))
        await asyncio.sleep(0)
        wait.cancel()
        peer.send(encode(Beat(leases=[str(i)])))
        outcome = (await asyncio.gather(wait, return_exceptions=True))[0]
        assert isinstance(outcome, asyncio.CancelledError)
    found = await taken(router, 20)
    assert [decode(frames[0]).leases for _, frames in found] == [[str(i)] for i in range(20)]


async def test_frames_of_any_size_arrive_as_they_were_sent_and_large_ones_are_not_copied(
    router, peer
):
    sizes = [0, 1, COPY_BYTES, COPY_BYTES + 1, 10 * COPY_BYTES]
    sent = [bytes([i]) * size for i, size in enumerate(sizes)]
    peer.send_multipart([b"head", *sent])
    ((_, frames),) = await taken(router, 1)
    assert [bytes(frame) for frame in frames[1:]] == sent
    assert [isinstance(frame, memoryview) for frame in frames[1:]] == [False] * 3 + [True] * 2


async def test_a_large_frame_outlives_the_messages_behind_it(router, peer):
    peer.send_multipart([b"one", b"a" * 10**6])
    ((_, frames),) = await taken(router, 1)
    for _ in range(20):
        peer.send_multipart([b"more", b"b" * 10**6])
        await taken(router, 1)
    assert bytes(frames[1]) == b"a" * 10**6


async def test_an_answer_reaches_its_peer_without_waiting(router, endpoint):
    async with Requester(endpoint, name="actor-0", owner="replay") as replay:
        ask = asyncio.create_task(replay.ask(HELLO, timeout_s=10, wait="an ack"))
        ((name, frames),) = await taken(router, 1)
        attachment = [b"x" * 300_000, b""]
        assert router.send_now(name, Ack(request=decode(frames[0]).request), attachment)
        _, found = await ask
    assert [bytes(frame) for frame in found] == attachment


async def test_what_could_not_be_sent_is_counted_by_its_cause(router, peer):
    assert router.send_now(b"nobody", Ack()) is False
    peer.setsockopt(zmq.RCVHWM, 1)
    peer.setsockopt(zmq.RCVBUF, 4096)
    peer.send(b"any")
    ((name, _),) = await taken(router, 1)
    begin, num_sent = time.monotonic(), 0
    while router.send_now(name, Ack(), [b"x" * 2**20]):
        num_sent += 1
        assert num_sent < 10 * MAX_ANSWERS, "the queue to a peer is bounded"
    assert time.monotonic() - begin < 10, "sending never blocks"
    assert router.unsent == {"gone": 1, "full": 1}


async def test_all_requests_that_a_peer_has_under_way_can_be_answered_in_one_go(router, endpoint):
    num = MAX_ANSWERS
    async with Requester(endpoint, name="actor-0", owner="replay", resend_s=60) as replay:
        asks = [
            asyncio.create_task(replay.ask(HELLO, timeout_s=20, wait="an ack")) for _ in range(num)
        ]
        for peer, frames in await taken(router, num):
            assert router.send_now(peer, Ack(request=decode(frames[0]).request))
        await asyncio.gather(*asks)
    assert not router.unsent


async def test_a_message_that_comes_while_another_task_sends_is_received(router, peer):
    peer.send(encode(HELLO))
    ((name, _),) = await taken(router, 1)
    wait = asyncio.create_task(router.receive())
    await asyncio.sleep(0.1)
    peer.send(encode(Beat(leases=["1"])))
    time.sleep(0.1)  # noqa: ASYNC251 - the loop is busy while the message arrives
    assert router.send_now(name, Ack())
    _, frames = await asyncio.wait_for(wait, 5)
    assert decode(frames[0]) == Beat(leases=["1"])


async def test_an_answer_that_is_larger_than_any_request_is_taken(router, endpoint):
    async with Requester(endpoint, name="actor-0", owner="replay") as replay:
        ask = asyncio.create_task(replay.ask(HELLO, timeout_s=10, wait="an ack"))
        ((name, frames),) = await taken(router, 1)
        answer = Ack(request=decode(frames[0]).request, note="x" * (MAX_MESSAGE_BYTES + 1))
        assert router.send_now(name, answer)
        assert (await ask)[0] == answer
