import asyncio
import contextlib
import logging

import pytest
import zmq

from treepo_async.errors import DeadlineError, WireError
from treepo_async.process import free_ports
from treepo_async.wire.guard import Complaints
from treepo_async.wire.keys import ClientKeys, client_keys, make_keys, server_keys
from treepo_async.wire.messages import Ack, Hello, decode
from treepo_async.wire.sockets import BlockingRequester, Requester, Router

HELLO = Hello(name="actor-0", run_id="run")
REFUSED = "refused a connection"


@pytest.fixture
def folder(tmp_path):
    make_keys(tmp_path / "keys", ["client", "guest-1", "guest-2"])
    return str(tmp_path / "keys")


@contextlib.asynccontextmanager
async def guarded(folder):
    """A router with keys that answers whoever gets through. Gives its endpoint and what it heard."""
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    router = Router(endpoint, max_bytes=10_000, keys=server_keys(folder))
    heard = []

    async def serve():
        while True:
            for peer, frames in await router.receive_some(limit=10, timeout_s=1):
                heard.append(bytes(frames[0]))
                router.send_now(peer, Ack(request=decode(frames[0]).request))

    task = asyncio.create_task(serve())
    try:
        yield endpoint, heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        router.close()


async def greet(endpoint, keys, *, timeout_s=10.0):
    async with Requester(endpoint, name="actor-0", owner="replay", keys=keys) as requester:
        await requester.ask(HELLO, timeout_s=timeout_s, wait="an ack")


async def test_a_client_on_the_allow_list_is_let_in_by_either_requester(folder):
    async with guarded(folder) as (endpoint, heard):
        await greet(endpoint, client_keys(folder, "actor-0"))

        def blocking():
            learner = BlockingRequester(
                endpoint, name="l", owner="replay", keys=client_keys(folder, "guest-1")
            )
            try:
                learner.ask(HELLO, timeout_s=10, wait="an ack")
            finally:
                learner.close()

        await asyncio.to_thread(blocking)
    assert len(heard) == 2


def wrong_keys(kind, folder, tmp_path):
    own = client_keys(folder, "actor-0")
    public, secret = zmq.curve_keypair()
    if kind == "no key":
        return None
    if kind == "another server's key":
        return ClientKeys(own.public, own.secret, public)
    if kind == "another's secret":
        return ClientKeys(own.public, secret, own.server_public)
    return ClientKeys(public, secret, own.server_public)


@pytest.mark.faults
@pytest.mark.parametrize(
    "kind", ["no key", "unknown key", "another server's key", "another's secret"]
)
async def test_nothing_of_a_wrong_client_arrives_one_line_says_so_and_others_are_served(
    folder, tmp_path, caplog, kind
):
    keys = wrong_keys(kind, folder, tmp_path)
    async with guarded(folder) as (endpoint, heard):
        with pytest.raises(DeadlineError):
            # long enough for several attempts to connect
            await greet(endpoint, keys, timeout_s=0.6)
        assert heard == []
        await greet(endpoint, client_keys(folder, "actor-0"))
    assert len(heard) == 1
    lines = [r.getMessage() for r in caplog.records if REFUSED in r.getMessage()]
    assert len(lines) == 1
    if kind == "unknown key":
        assert "127.0.0.1" in lines[0]


@pytest.mark.faults
async def test_a_revoked_key_is_refused_at_its_next_connection_and_no_other_is(folder, tmp_path):
    guest, other = client_keys(folder, "guest-1"), client_keys(folder, "guest-2")
    async with (
        guarded(folder) as (endpoint, heard),
        Requester(endpoint, name="g", owner="replay", keys=guest) as connected,
    ):
        await connected.ask(HELLO, timeout_s=10, wait="an ack")
        (tmp_path / "keys" / "allowed" / "guest-1.key").unlink()
        with pytest.raises(DeadlineError):
            await greet(endpoint, guest, timeout_s=0.4)
        await greet(endpoint, other)
        await connected.ask(HELLO, timeout_s=10, wait="an ack")
    assert len(heard) == 3


async def test_a_client_with_keys_gives_nothing_to_a_router_without(folder):
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    with contextlib.closing(Router(endpoint, max_bytes=10_000)) as router:
        with pytest.raises(DeadlineError):
            await greet(endpoint, client_keys(folder, "actor-0"), timeout_s=0.4)
        assert await router.receive_some(limit=1, timeout_s=0) == []


async def test_two_guarded_routers_of_one_process_have_their_own_allow_lists(folder, tmp_path):
    make_keys(tmp_path / "others")
    others = str(tmp_path / "others")
    async with guarded(folder) as (one, heard_one), guarded(others) as (two, heard_two):
        await greet(one, client_keys(folder, "actor-0"))
        await greet(two, client_keys(others, "actor-0"))
        own = client_keys(others, "actor-0")
        mixed = ClientKeys(own.public, own.secret, server_keys(folder).public)
        with pytest.raises(DeadlineError):
            await greet(one, mixed, timeout_s=0.4)
    assert (len(heard_one), len(heard_two)) == (1, 1)


def test_an_endpoint_that_is_taken_leaves_nothing_running(folder):
    endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    with contextlib.closing(Router(endpoint, max_bytes=1)), pytest.raises(zmq.ZMQError):
        Router(endpoint, max_bytes=1, keys=server_keys(folder))
    Router(endpoint, max_bytes=1, keys=server_keys(folder)).close()


def test_with_keys_an_endpoint_off_loopback_may_be_bound_and_connected_to(folder):
    (port,) = free_ports(1)
    Router(f"tcp://0.0.0.0:{port}", max_bytes=1, keys=server_keys(folder)).close()
    keys = client_keys(folder, "a")
    BlockingRequester("tcp://192.0.2.1:5555", name="a", owner="replay", keys=keys).close()
    with pytest.raises(WireError, match=r"no tcp://host:port"):
        Router("ipc:///tmp/replay", max_bytes=1, keys=server_keys(folder))


def test_a_source_is_complained_about_once_a_minute_and_the_memory_is_bounded(caplog, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("treepo_async.wire.guard.time.monotonic", lambda: now[0])
    complaints = Complaints()
    with caplog.at_level(logging.WARNING):
        for second in range(130):
            now[0] = 100.0 + second
            complaints.about("10.0.0.7")
    assert len(caplog.records) == 3
    for i in range(5000):
        complaints.about(str(i))
    assert len(complaints._said) <= 1024
