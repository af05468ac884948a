import asyncio
import contextlib
import time

import pytest
import zmq.asyncio

from treepo_async.errors import DeadlineError, RefusedError, WireError
from treepo_async.process import free_ports
from treepo_async.wire.messages import Ack, AskLease, Beat, Gate, Hello, Join, Nack, decode
from treepo_async.wire.sockets import BlockingRequester, Requester, Router

MAX_BYTES = 10_000
HELLO = Hello(name="actor-0", run_id="run")


@pytest.fixture
def endpoint():
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
async def router(endpoint):
    router = Router(endpoint, max_bytes=MAX_BYTES)
    yield router
    router.close()


@contextlib.asynccontextmanager
async def serving(router, answer):
    """Serve in the background: `answer(peer, message, attachment)` gives what to send, or None."""

    async def serve():
        while True:
            peer, frames = await router.receive()
            found = answer(peer, decode(frames[0]), frames[1:])
            if found is not None:
                await router.send(peer, *found)

    task = asyncio.create_task(serve())
    try:
        yield
    finally:
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(outcome, asyncio.CancelledError), f"the router's loop ended: {outcome!r}"


def ack(_peer, message, _attachment):
    return (Ack(request=message.request),)


def requester(endpoint, **options):
    return Requester(endpoint, name="actor-0", owner="replay", **options)


async def test_a_request_gets_its_answer_with_the_attachment(router, endpoint):
    def echo(_peer, message, attachment):
        return Ack(request=message.request, note=message.name), [*attachment, b"more"]

    async with serving(router, echo), requester(endpoint) as replay:
        message, attachment = await replay.ask(HELLO, [b"one", b""], timeout_s=5, wait="an ack")
    assert message.note == "actor-0"
    assert attachment == [b"one", b"", b"more"]


async def test_answers_in_another_order_reach_their_askers(router, endpoint):
    held = []

    def hold(peer, message, _attachment):
        held.append((peer, message))

    async with serving(router, hold), requester(endpoint) as replay, asyncio.timeout(10):
        asks = [
            asyncio.create_task(replay.ask(Hello(name=name, run_id=""), timeout_s=5, wait="an ack"))
            for name in "abcde"
        ]
        while len(held) < len(asks):  # noqa: ASYNC110 - the router has no event for it
            await asyncio.sleep(0.01)
        for peer, message in reversed(held):
            await router.send(peer, Ack(request=message.request, note=message.name))
        answers = await asyncio.gather(*asks)
    assert [message.note for message, _ in answers] == list("abcde")


async def test_a_request_without_an_answer_is_sent_again_with_the_same_number(router, endpoint):
    numbers = []

    def second_time(peer, message, attachment):
        numbers.append((peer, message.request))
        return ack(peer, message, attachment) if len(numbers) == 2 else None

    async with serving(router, second_time), requester(endpoint, resend_s=0.1) as replay:
        await replay.ask(HELLO, timeout_s=5, wait="an ack")
    assert len(numbers) == 2
    assert numbers[0] == numbers[1]


async def test_a_second_answer_to_the_same_request_is_nobodys(router, endpoint):
    async def twice(peer, message):
        for _ in range(2):
            await router.send(peer, Ack(request=message.request, note=message.name))

    async def serve():
        while True:
            peer, frames = await router.receive()
            await twice(peer, decode(frames[0]))

    task = asyncio.create_task(serve())
    async with requester(endpoint) as replay:
        notes = []
        for name in "abc":
            message, _ = await replay.ask(Hello(name=name, run_id=""), timeout_s=5, wait="an ack")
            notes.append(message.note)
    task.cancel()
    assert notes == list("abc")


async def test_a_deadline_names_the_wait_and_who_should_have_ended_it(router, endpoint):
    async with requester(endpoint, resend_s=0.05) as replay:
        begin = time.monotonic()
        with pytest.raises(DeadlineError, match=r"waited 0\.2 s for the ack of a tree; replay"):
            await replay.ask(HELLO, timeout_s=0.2, wait="the ack of a tree")
    assert 0.2 <= time.monotonic() - begin < 2


async def test_without_any_router_the_deadline_comes_all_the_same(endpoint):
    async with requester(endpoint) as replay:
        with pytest.raises(DeadlineError, match=r"0.2 s for replay to come up; replay"):
            await replay.ask(HELLO, timeout_s=0.2, wait="replay to come up")


async def test_a_request_sent_before_the_router_is_up_is_answered_when_it_is(endpoint):
    async with requester(endpoint) as replay:
        ask = asyncio.create_task(replay.ask(HELLO, timeout_s=10, wait="an ack"))
        await asyncio.sleep(0.1)
        router = Router(endpoint, max_bytes=MAX_BYTES)
        async with serving(router, ack):
            await ask
    router.close()


async def test_a_nack_is_raised_with_its_reason(router, endpoint):
    def refuse(_peer, message, _attachment):
        return (Nack(request=message.request, reason="stale", detail="too old"),)

    async with serving(router, refuse), requester(endpoint) as replay:
        with pytest.raises(RefusedError, match="too old") as caught:
            await replay.ask(HELLO, timeout_s=5, wait="an ack")
    assert (caught.value.reason, caught.value.retry) == ("stale", False)


async def test_a_pushed_gate_reaches_the_callback_and_no_asker(router, endpoint):
    seen = []

    async def serve():
        while True:
            peer, frames = await router.receive()
            request = decode(frames[0]).request
            await router.send(peer, Gate(epoch=1, is_open=False))
            await router.send(peer, Gate(request=request, epoch=2, is_open=True))

    task = asyncio.create_task(serve())
    async with requester(endpoint, on_gate=seen.append) as host:
        answer, _ = await host.ask(Join(name="actor-0"), timeout_s=5, wait="an answer to Join")
    task.cancel()
    assert seen == [Gate(epoch=1, is_open=False)]
    assert (answer.epoch, answer.is_open) == (2, True)


async def test_what_is_told_arrives_without_an_answer(router, endpoint):
    heard = asyncio.Queue()

    def listen(_peer, message, _attachment):
        heard.put_nowait(message)

    async with serving(router, listen), requester(endpoint) as replay:
        await replay.tell(Beat(leases=["000000003"]))
        assert await asyncio.wait_for(heard.get(), 5) == Beat(leases=["000000003"])


async def test_an_answer_that_is_no_message_is_raised_where_it_is_waited_for(endpoint):
    socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
    socket.bind(endpoint)

    async def garble():
        while True:
            peer, *_ = await socket.recv_multipart()
            await socket.send_multipart([peer, b"\xc1garbage"])

    task = asyncio.create_task(garble())
    begin = time.monotonic()
    async with requester(endpoint) as replay:
        for _ in range(2):
            with pytest.raises(WireError, match="message"):
                await replay.ask(HELLO, timeout_s=20, wait="an ack")
    task.cancel()
    socket.close(linger=0)
    assert time.monotonic() - begin < 5, "it does not take the deadline"


# ------------------------------------------------------------------ blocking


async def test_a_blocking_requester_works_in_a_thread(router, endpoint):
    numbers = []

    def third_time(peer, message, attachment):
        numbers.append(message.request)
        return ack(peer, message, attachment) if len(numbers) != 1 else None

    def ask_twice():
        learner = BlockingRequester(endpoint, name="learner-0", owner="replay", resend_s=0.1)
        try:
            return [learner.ask(AskLease(wait_s=1), timeout_s=5, wait="a lease") for _ in range(2)]
        finally:
            learner.close()

    async with serving(router, third_time):
        answers = await asyncio.wait_for(asyncio.to_thread(ask_twice), 10)
    assert [message.request for message, _ in answers] == [1, 2]
    assert numbers == [1, 1, 2], "the first one was sent again"


async def test_a_blocking_requester_raises_nacks_and_passes_other_messages_over(router, endpoint):
    def ask():
        learner = BlockingRequester(endpoint, name="learner-0", owner="replay")
        try:
            learner.ask(HELLO, timeout_s=5, wait="an ack")
        finally:
            learner.close()

    async def serve():
        peer, frames = await router.receive()
        request = decode(frames[0]).request
        await router.send(peer, Gate(epoch=1, is_open=True))
        await router.send(peer, Ack(request=request + 1))
        await router.send(peer, Nack(request=request, reason="wrong_run", detail="run b"))

    task = asyncio.create_task(serve())
    with pytest.raises(RefusedError, match="wrong_run: run b"):
        await asyncio.wait_for(asyncio.to_thread(ask), 10)
    await task


@pytest.mark.parametrize("is_up", [False, True], ids=["no router", "a silent router"])
def test_a_blocking_deadline_names_the_wait_and_its_length(endpoint, is_up):
    socket = zmq.Context.instance().socket(zmq.ROUTER)
    if is_up:
        socket.bind(endpoint)
    learner = BlockingRequester(endpoint, name="learner-0", owner="replay", resend_s=0.05)
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match=r"waited 0\.2 s for the batch; replay"):
        learner.ask(HELLO, timeout_s=0.2, wait="the batch")
    assert time.monotonic() - begin < 2
    learner.close()
    socket.close(linger=0)


# ------------------------------------------------------------------ bad peers


async def test_an_oversize_message_cuts_its_sender_and_nobody_else(router, endpoint):
    received = []

    def note(peer, message, attachment):
        received.append(sum(map(len, attachment)))
        return ack(peer, message, attachment)

    big, limit = [b"x" * (MAX_BYTES + 1)], [b"x" * MAX_BYTES]
    async with (
        serving(router, note),
        requester(endpoint) as honest,
        requester(endpoint) as careless,
    ):
        await honest.ask(HELLO, timeout_s=5, wait="an ack")
        with pytest.raises(DeadlineError):
            await careless.ask(HELLO, big, timeout_s=0.3, wait="an ack")
        await honest.ask(HELLO, limit, timeout_s=5, wait="an ack")
        await careless.ask(HELLO, limit, timeout_s=10, wait="an ack")
    assert received == [0, MAX_BYTES, MAX_BYTES]


async def test_sending_to_a_peer_that_was_never_there_says_so(router):
    assert await router.send(b"nobody", Ack()) is False


async def test_sending_to_a_peer_that_has_vanished_says_so(router, endpoint):
    peers = []

    def note(peer, message, attachment):
        peers.append(peer)
        return ack(peer, message, attachment)

    async with serving(router, note):
        async with requester(endpoint) as replay:
            await replay.ask(HELLO, timeout_s=5, wait="an ack")
            assert await router.send(peers[0], Ack()) is True
        async with asyncio.timeout(5):
            while await router.send(peers[0], Ack()):  # noqa: ASYNC110 - nor for this
                await asyncio.sleep(0.01)


async def test_a_peer_that_never_reads_is_given_up_in_the_end(router, endpoint):
    socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.RCVBUF, 4096)
    socket.connect(endpoint)
    await socket.send_multipart([b"any"])
    peer, _ = await asyncio.wait_for(router.receive(), 5)
    begin = time.monotonic()
    num_sent = 0
    while await router.send(peer, Ack(), [b"x" * 2**20]):
        num_sent += 1
        assert num_sent < 500, "the queue to a peer is bounded"
        await asyncio.sleep(0)
    assert time.monotonic() - begin < 10, "sending never blocks"
    socket.close(linger=0)


async def test_two_peers_of_one_name_are_told_apart(router, endpoint):
    peers = set()

    def note(peer, message, attachment):
        peers.add(peer)
        return ack(peer, message, attachment)

    async with serving(router, note), requester(endpoint) as one, requester(endpoint) as other:
        for replay in (one, other):
            await replay.ask(HELLO, timeout_s=5, wait="an ack")
    assert len(peers) == 2


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://0.0.0.0:5555",
        "tcp://*:5555",
        "tcp://10.0.0.7:5555",
        "tcp://127.0.0.1.example.com:5555",
        "tcp://[::]:5555",
    ],
)
@pytest.mark.parametrize("end", ["router", "requester", "blocking"])
def test_an_endpoint_off_loopback_is_refused(end, endpoint):
    opens = {
        "router": lambda: Router(endpoint, max_bytes=1),
        "requester": lambda: Requester(endpoint, name="a", owner="b"),
        "blocking": lambda: BlockingRequester(endpoint, name="a", owner="b"),
    }
    with pytest.raises(WireError, match="not on loopback"):
        opens[end]()
