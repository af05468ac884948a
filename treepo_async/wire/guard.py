"""Who may connect to a socket with keys: those on its allow-list, looked up anew at each connection.

zmq asks the guard during the handshake (ZAP), in the guard's own thread, so that a busy loop keeps nobody waiting; nothing
that a refused peer sends reaches the loop. A peer that shows no key at all fails before the guard is asked, and is
seen by the socket's monitor. Both are logged, at most once a minute for each source.

Waits: the guard's thread for handshakes, the monitor's for events, both until `stop`.
"""

import logging
import threading
import time
from typing import Any

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from treepo_async.wire.keys import ServerKeys, is_allowed

LOG_EVERY_S = 60.0
MAX_SOURCES = 1024
"""That are remembered as logged."""
POLL_MS = 200
_FAILED = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL

log = logging.getLogger(__name__)


class Guard:
    """Lets clients in; see the module."""

    def __init__(self, keys: ServerKeys) -> None:
        self.context: Any = zmq.Context()
        """For the sockets that it guards."""
        self._complaints = Complaints()
        self._gatehouse = _Gatehouse(self.context, keys, self._complaints)
        self._gatehouse.start()
        self._monitor: threading.Thread | None = None
        self._stopped = threading.Event()

    def watch(self, socket: Any) -> None:
        """Log peers that show the socket no key."""
        events = socket.get_monitor_socket(_FAILED)
        self._monitor = threading.Thread(
            target=self._read, args=(events,), name="keyless peers", daemon=True
        )
        self._monitor.start()

    def stop(self) -> None:
        """End, once the last answers of the guarded sockets are out or their linger is over."""
        self._stopped.set()
        if self._monitor is not None:
            self._monitor.join()
        self._gatehouse.stop()
        self.context.term()

    def _read(self, events: Any) -> None:
        try:
            while not self._stopped.is_set():
                if events.poll(POLL_MS):
                    parse_monitor_message(events.recv_multipart())
                    self._complaints.about(
                        "a peer without a key of the run, or of another protocol"
                    )
        finally:
            events.close(linger=0)


class Complaints:
    """One line in the log for each source and minute."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def about(self, source: str) -> None:
        """Log that a source was refused, unless that was said a moment ago."""
        now = time.monotonic()
        if now - self._said.get(source, -LOG_EVERY_S) < LOG_EVERY_S:
            return
        if len(self._said) >= MAX_SOURCES:
            self._said.clear()
        self._said[source] = now
        log.warning("refused a connection: %s", source)


class _Gatehouse(ThreadAuthenticator):
    """Answers zmq's question whether a client may come in."""

    def __init__(self, context: Any, keys: ServerKeys, complaints: Complaints) -> None:
        super().__init__(context)
        self._keys, self._complaints = keys, complaints
        self._address = ""
        self.configure_curve_callback("*", self)

    async def handle_zap_message(self, msg: list[bytes]) -> None:
        """Note where the client comes from, which the library does not tell `callback`."""
        self._address = msg[3].decode(errors="replace") if len(msg) > 3 else "nowhere"
        await super().handle_zap_message(msg)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client's public key is on the allow-list."""
        if is_allowed(self._keys.allowed, key):
            return True
        self._complaints.about(f"{self._address}, with a key that is not in {self._keys.allowed}")
        return False
