"""What a requester does by itself about a refusal: greet, wait, or give up."""

import asyncio
import contextlib
import time

import pytest

from treepo_async.errors import DeadlineError, RefusedError, WireError
from treepo_async.process import free_ports
from treepo_async.wire.messages import Ack, Beat, Hello, Nack, decode
from treepo_async.wire.sockets import BlockingRequester, Requester, Router

HELLO = Hello(name="actor-0", run_id="run")
BEAT = Beat(leases=[])


class Replay:
    """A router that wants to be greeted, and refuses what it is told to."""

    def __init__(self, router):
        self.router = router
        self.known, self.heard = set(), []
        self.refusals = []
        """Of requests that are no greetings, used up one by one."""

    async def serve(self):
        while True:
            for peer, frames in await self.router.receive_some(limit=10, timeout_s=1):
                message = decode(frames[0])
                self.heard.append(message)
                answer = self.answer(peer, message)
                self.router.send_now(peer, answer)

    def answer(self, peer, message):
        number = message.request
        if isinstance(message, Hello):
            if message.run_id != "run":
                return Nack(request=number, reason="wrong_run", detail="another")
            self.known.add(peer)
        elif peer not in self.known:
            return Nack(request=number, reason="hello_first", detail="who?", retry=True)
        elif self.refusals:
            reason, retry, after_s = self.refusals.pop(0)
            return Nack(
                request=number, reason=reason, detail="why", retry=retry, retry_after_s=after_s
            )
        return Ack(request=number)

    def heard_kinds(self):
        return [type(message).__name__ for message in self.heard]


@pytest.fixture
def endpoint():
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
async def replay(endpoint):
    router = Router(endpoint, max_bytes=10_000)
    replay = Replay(router)
    task = asyncio.create_task(replay.serve())
    yield replay
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    router.close()


def ask_blocking(endpoint, message, timeout_s, hello, on_resend):
    requester = BlockingRequester(
        endpoint, name="actor-0", owner="replay", hello=hello, resend_s=0.5
    )
    try:
        return requester.ask(message, timeout_s=timeout_s, wait="an ack", on_resend=on_resend)
    finally:
        requester.close()


@pytest.fixture(params=["asyncio", "blocking"])
def ask(request, endpoint):
    """`await ask(message)` with either requester."""

    async def ask(message=BEAT, *, timeout_s=10.0, hello=HELLO, on_resend=lambda: None):
        if request.param == "blocking":
            return await asyncio.to_thread(
                ask_blocking, endpoint, message, timeout_s, hello, on_resend
            )
        async with Requester(endpoint, name="actor-0", owner="replay", hello=hello) as requester:
            return await requester.ask(message, timeout_s=timeout_s, wait="an ack")

    return ask


async def test_a_peer_that_is_not_known_greets_and_its_request_is_answered(replay, ask):
    answer, _ = await ask()
    assert isinstance(answer, Ack)
    assert replay.heard_kinds() == ["Beat", "Hello", "Beat"]
    numbers = [message.request for message in replay.heard]
    assert numbers[0] == numbers[2] == answer.request != numbers[1]


async def test_without_a_greeting_the_refusal_is_raised(replay, ask):
    with pytest.raises(RefusedError, match="who") as caught:
        await ask(hello=None)
    assert caught.value.reason == "hello_first"


async def test_a_greeting_that_is_refused_is_raised_where_the_answer_is_waited_for(replay, ask):
    with pytest.raises(RefusedError, match="wrong_run"):
        await ask(hello=Hello(name="actor-0", run_id="other"))


async def test_a_refusal_for_now_is_waited_out_at_least_as_long_as_it_says(replay, ask):
    replay.refusals = [("disk_full", True, 0.0), ("disk_full", True, 0.3)]
    begin = time.monotonic()
    answer, _ = await ask()
    assert isinstance(answer, Ack)
    assert time.monotonic() - begin >= 0.3
    assert replay.heard_kinds() == ["Beat", "Hello", "Beat", "Beat", "Beat"]


async def test_a_refusal_for_good_is_raised_at_once(replay, ask):
    replay.refusals = [("disk_full", True, 0.0), ("stale", False, 0.0)]
    with pytest.raises(RefusedError, match="stale"):
        await ask(timeout_s=50)
    assert replay.refusals == []


async def test_a_refusal_that_does_not_end_is_named_by_the_deadline(replay, ask):
    replay.refusals = [("disk_full", True, 0.05)] * 1000
    with pytest.raises(DeadlineError, match=r"an ack \(refused until then by disk_full: why\)"):
        await ask(timeout_s=0.5)
    assert 900 < len(replay.refusals) < 999, "it waits between attempts"


async def test_a_router_that_forgets_at_once_is_not_asked_without_a_pause(replay, ask):
    class Forgetful(set):
        def add(self, _):
            pass

    replay.known = Forgetful()
    with pytest.raises(DeadlineError, match="hello_first"):
        await ask(timeout_s=0.5)
    assert len(replay.heard) < 40


async def test_a_waiting_learner_hears_of_every_attempt(replay, endpoint):
    replay.refusals, calls = [("disk_full", True, 0.1)] * 3, []
    await asyncio.to_thread(ask_blocking, endpoint, BEAT, 10, HELLO, lambda: calls.append(1))
    assert len(calls) == 4, "after the greeting and after each refusal"


async def test_many_requests_of_an_unknown_peer_greet_once(replay, endpoint):
    async with Requester(endpoint, name="actor-0", owner="replay", hello=HELLO) as requester:
        await asyncio.gather(*(requester.ask(BEAT, timeout_s=10, wait="an ack") for _ in range(10)))
        assert replay.heard_kinds().count("Hello") == 1
        replay.known.clear()
        await asyncio.gather(*(requester.ask(BEAT, timeout_s=10, wait="an ack") for _ in range(10)))
    assert replay.heard_kinds().count("Hello") == 2


async def test_an_attachment_above_the_limit_is_refused_before_it_is_sent(replay, endpoint):
    async with Requester(
        endpoint, name="actor-0", owner="replay", hello=HELLO, max_bytes=1000
    ) as requester:
        with pytest.raises(WireError, match=r"1001 bytes is above replay\.max_tree_bytes=1000"):
            await requester.ask(BEAT, [b"x" * 500, b"y" * 501], timeout_s=10, wait="an ack")
        assert replay.heard == []
        await requester.ask(BEAT, [b"x" * 500, b"y" * 500], timeout_s=10, wait="an ack")


async def test_what_is_told_while_nobody_is_there_is_given_up(endpoint):
    async with Requester(endpoint, name="a", owner="replay", resend_s=0.2) as requester:
        assert await asyncio.wait_for(requester.tell(BEAT), 10) is False
        router = Router(endpoint, max_bytes=1000)
        with contextlib.closing(router):
            assert await asyncio.wait_for(told(requester), 10)


async def told(requester):
    while not await requester.tell(BEAT):  # noqa: ASYNC110 - it waits itself
        await asyncio.sleep(0)
    return True
