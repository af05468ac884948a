"""How the learner's processes of several nodes talk: JSON lines over TCP, after both ends have shown that they know the run's secret.

    leader    -> {"nonce"}
    follower  -> {"role", "first_rank", "num_ranks", "nonce", "proof"}
    leader    -> {"proof"}                              joined; from here on what `lead` and `follow` say

The secret is a file in the run's folder that its owner alone can read; a proof is an HMAC of both nonces under it, so nobody
without the file leads or follows, and nothing that was overheard can be said again. Lines are not encrypted: they name a
checkpoint and a port, and no tensor, whose groups (gloo, NCCL) are open to the network of the ranks anyway.

Waits: `receive_one` for a message of the handshake, with a deadline. Whoever calls `receive` has seen that the socket is
readable, and sends are short.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECRET_FILE = "group_key"
"""In a run's folder."""
MAX_LINE = 2**16
SEND_S = 10.0
"""Longest send of a line: the other end reads at once, or is gone."""
KEEPALIVE = ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""A node that is gone without a word is noticed after about 20 s."""

GREETING = ("nonce", "role", "first_rank", "num_ranks")
"""What a follower says of itself, in the order in which its proof is bound to it."""

Message = Mapping[str, Any]


class LineError(ConnectionError):
    """The other end is gone, or does not keep to the protocol."""


@dataclass(eq=False)
class Line:
    """One connection."""

    socket: socket.socket
    _unread: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        self.socket.settimeout(SEND_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE:
            self.socket.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message.

        Raises:
            LineError: the other end is gone.
        """
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise LineError(str(error)) from error

    def receive(self) -> list[Message]:
        """The messages that are whole by now; the socket must be readable.

        Raises:
            LineError: the other end is gone, or sent something else.
        """
        self._read()
        return self.whole()

    def whole(self) -> list[Message]:
        """The messages that were read already and not given yet.

        Raises:
            LineError: the other end sent something else.
        """
        *lines, rest = bytes(self._unread).split(b"\n")
        self._unread = bytearray(rest)
        return [_parse(line) for line in lines]

    def receive_one(self, timeout_s: float) -> Message:
        """The next message; those behind it stay.

        Raises:
            LineError: it did not come in time, the other end is gone, or sent something else.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                self._read()
            finally:
                self.socket.settimeout(SEND_S)
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread = bytearray(rest)
        return _parse(line)

    def _read(self) -> None:
        try:
            data = self.socket.recv(MAX_LINE)
        except OSError as error:
            raise LineError(str(error)) from error
        if not data:
            raise LineError("it was closed")
        self._unread += data
        if len(self._unread.rpartition(b"\n")[2]) > MAX_LINE:
            raise LineError(f"a line has more than {MAX_LINE} bytes")

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def _parse(line: bytes) -> Message:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LineError(f"no JSON: {error}") from error
    if not isinstance(found, dict):
        raise LineError("no JSON object")
    return found


def group_secret(run_dir: Path) -> bytes:
    """The secret of a run's learner, made if there is none yet; of several processes that want to make it, one does."""
    file = run_dir / SECRET_FILE
    if not file.exists():
        temporary = file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(secrets.token_hex(32))
        # unlike a rename, a link does not put another secret in the place of one that is used already
        with contextlib.suppress(FileExistsError):
            os.link(temporary, file)
        temporary.unlink()
    return file.read_bytes()


def nonce() -> str:
    """A number that is used once."""
    return secrets.token_hex(16)


def proof(secret: bytes, *words: Any) -> str:
    """That whoever says it knows the secret, bound to the words."""
    return hmac.new(secret, json.dumps(words).encode(), hashlib.sha256).hexdigest()


def is_proof(said: Any, secret: bytes, *words: Any) -> bool:
    """Whether a proof is right."""
    if not isinstance(said, str):
        return False
    # as text it would have to be ASCII; what cannot be encoded is no proof either
    found = said.encode(errors="replace")
    return hmac.compare_digest(found, proof(secret, *words).encode())
