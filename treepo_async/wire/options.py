"""What all sockets have in common: high-water marks, heartbeats, keys, and which endpoints go without keys.

Invariant: no socket leaves this machine in the clear. An endpoint off loopback needs the keys of the run
(`wire.keys`), whoever binds or connects.
"""

import ipaddress
import re
import uuid
from collections.abc import Sequence
from typing import Any

import zmq

from treepo_async.errors import WireError
from treepo_async.wire.keys import ClientKeys, ServerKeys

MAX_TREES = 16
"""Requests to replay that wait in one connection, on each side; a tree may be large."""
MAX_ANSWERS = 64
"""Answers that wait in one connection, on each side: at least as many as a peer has requests under way."""
HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 20_000
"""A peer that is silent this long is cut. A heartbeat waits behind the frame that is being sent, so a tree's largest frame
must get through in this time."""
LINGER_MS = 2_000
"""What was sent last may still go out for this time when a socket is closed."""
COPY_BYTES = 2**16
"""Frames up to this size are copied out of zmq's memory, which costs less than keeping track of them."""

_TCP = re.compile(r"tcp://(?P<host>[^/\s]+):(?P<port>\d+)")


def check_endpoint(endpoint: str, keys: ClientKeys | ServerKeys | None) -> None:
    """Refuse an endpoint that other machines reach, unless there are keys.

    Raises:
        WireError: naming the endpoint and what it needs.
    """
    match = _TCP.fullmatch(endpoint)
    if match is None:
        raise WireError(f"endpoint {endpoint} is no tcp://host:port")
    if keys is None and not is_loopback(match["host"]):
        raise WireError(
            f"endpoint {endpoint} is not on loopback and would be open to other machines; set cluster.keys_dir to a "
            "folder that python launch/keys.py made, or cluster.host=127.0.0.1"
        )


def is_loopback(host: str) -> bool:
    """Whether a host is an address of this machine's loopback; names are not looked up."""
    try:
        return ipaddress.IPv4Address(host).is_loopback
    except ValueError:
        return False


def check_size(attachment: Sequence[bytes], max_bytes: int | None) -> None:
    """Refuse to send what the other end would cut the connection for.

    Raises:
        WireError: naming the size and the limit.
    """
    size = sum(map(len, attachment))
    if max_bytes is not None and size > max_bytes:
        raise WireError(
            f"an attachment of {size} bytes is above replay.max_tree_bytes={max_bytes}; raise it, or grow smaller trees"
        )


def dealer(context: Any, endpoint: str, *, name: str, keys: ClientKeys | None) -> Any:
    """A connected socket of a peer; its identity is the name and a fresh incarnation."""
    check_endpoint(endpoint, keys)
    socket = _socket(context, zmq.DEALER, sends=MAX_TREES, receives=MAX_ANSWERS)
    socket.setsockopt(zmq.IDENTITY, f"{name}:{uuid.uuid4().hex[:12]}".encode())
    socket.setsockopt(zmq.IMMEDIATE, 1)
    if keys is not None:
        socket.curve_serverkey = keys.server_public
        socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
    socket.connect(endpoint)
    return socket


def router(context: Any, endpoint: str, *, max_bytes: int, keys: ServerKeys | None) -> Any:
    """A bound socket that serves peers."""
    check_endpoint(endpoint, keys)
    socket = _socket(context, zmq.ROUTER, sends=MAX_ANSWERS, receives=MAX_TREES)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    if keys is not None:
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = keys.public, keys.secret
        socket.zap_domain = b"*"
    try:
        socket.bind(endpoint)
    except zmq.ZMQError:
        socket.close(linger=0)
        raise
    return socket


def take(socket: Any) -> list[bytes] | None:
    """The frames of a message that is there, None when there is none. A large frame is a view of zmq's own memory."""
    try:
        frames = socket.recv_multipart(flags=zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None
    return unwrap(frames)


def unwrap(frames: Sequence[Any]) -> list[bytes]:
    """The content of zmq's frames."""
    return [f.bytes if len(f) <= COPY_BYTES else f.buffer for f in frames]


def _socket(context: Any, kind: int, *, sends: int, receives: int) -> Any:
    socket = context.socket(kind)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, sends)
    socket.setsockopt(zmq.RCVHWM, receives)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    return socket
