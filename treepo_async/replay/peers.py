"""Who speaks to replay: who has greeted, which process of a name is its latest, and who is to be quiet for a while.

Pure: the caller gives the time, in seconds of its own monotonic clock. A peer is known by the identity of its connection,
`name:incarnation`. Invariants: of a name at most one identity is let in, the one that greeted last; memory is bounded
by `MAX_PEERS`, however many identities are made up.
"""

from collections import deque
from dataclasses import dataclass
from typing import TypeVar

from treepo_async.errors import RefusedError
from treepo_async.wire.messages import (
    PROTOCOL,
    AskBatch,
    Hello,
    Message,
    Published,
    Refusal,
    Retired,
    Trained,
)

T = TypeVar("T")

SILENT_S = 60.0
STRIKES, STRIKES_S, SUSPENDED_S = 5, 60.0, 60.0
"""So many invalid messages within so long suspend a peer for so long."""
MAX_PEERS = 4096
GUEST_NAME = "guest"
"""How the name of an actor begins that is none of the run's own."""
ACTOR_NAMES = ("actor", GUEST_NAME)
"""How the names of peers begin that grow trees."""
LEARNER_NAME = "learner"
"""How that of a learner begins."""
LEARNERS_OWN = (AskBatch, Trained, Published, Retired)
"""Messages that move the queue on: a peer that grows trees has no business with them."""


@dataclass(slots=True)
class _Peer:
    name: str
    heard: float
    is_fenced: bool = False
    is_silent: bool = False


class Peers:
    """See the module."""

    def __init__(
        self,
        *,
        run_id: str,
        config_digest: str,
        tokenizer_digest: str,
        silent_s: float = SILENT_S,
    ) -> None:
        """Know nobody.

        Args:
            run_id: of the run; a peer of another one is refused.
            config_digest: of the run's config; empty: any will do.
            tokenizer_digest: of the model's tokenizer; empty here or at a peer: any will do.
            silent_s: a peer that was not heard of for this long does not count.
        """
        self._run_id = run_id
        self._config_digest, self._tokenizer_digest = config_digest, tokenizer_digest
        self._silent_s = silent_s
        self._peers: dict[bytes, _Peer] = {}
        """In the order of greeting."""
        self._latest: dict[str, bytes] = {}
        """Of each name the identity that greeted last."""
        self._strikes: dict[bytes, deque[float]] = {}
        self._suspended: dict[bytes, float] = {}
        """Until when."""

    def greet(self, peer: bytes, hello: Hello, now: float) -> str | None:
        """Let a peer in. Gives the name of the actor whose earlier process it takes the place of, if there is one.

        Raises:
            RefusedError: it is of another run, config, tokenizer or protocol, or a later process has its place.
        """
        self._check_suspended(peer, now)
        self._check_fenced(peer)
        self._check_hello(hello)
        self._forget(peer, self._peers.pop(peer, None))
        earlier = self._latest.get(hello.name)
        if earlier is not None:
            self._peers[earlier].is_fenced = True
        self._peers[peer] = _Peer(hello.name, now)
        self._latest[hello.name] = peer
        for old, known in _trim(self._peers):
            self._forget(old, known)
        is_actor = hello.name.startswith(ACTOR_NAMES)
        return hello.name if earlier is not None and is_actor else None

    def check(self, peer: bytes, now: float) -> None:
        """Let a message of a peer pass.

        Raises:
            RefusedError: the peer has not greeted, is suspended, or a later process has its place.
        """
        self._check_suspended(peer, now)
        self._check_fenced(peer)
        known = self._peers.get(peer)
        if known is None:
            raise RefusedError(
                Refusal.HELLO_FIRST, f"{self.name_of(peer)} has not greeted", retry=True
            )
        known.heard, known.is_silent = now, False

    def leave(self, peer: bytes) -> None:
        """A peer ends: it does not count any more, unless it speaks again."""
        if peer in self._peers:
            self._peers[peer].is_silent = True

    def check_role(self, peer: bytes, message: Message) -> None:
        """Let a message pass that peers of this name may send.

        Raises:
            RefusedError: it is the learner's to send.
        """
        name = self.name_of(peer)
        if isinstance(message, LEARNERS_OWN) and not name.startswith(LEARNER_NAME):
            raise RefusedError(
                Refusal.PROTOCOL,
                f"{name} sent {type(message).__name__}, which only a {LEARNER_NAME} may send",
                retry=False,
            )

    def name_of(self, peer: bytes) -> str:
        """The name that a peer greeted with, or that its identity claims."""
        known = self._peers.get(peer)
        if known is not None:
            return known.name
        return peer.partition(b":")[0].decode(errors="replace")

    def strike(self, peer: bytes, now: float) -> bool:
        """Note an invalid message; enough of them suspend the peer. False where it is already: no more need be said."""
        if self._suspended.get(peer, now) > now:
            return False
        strikes = self._strikes.setdefault(peer, deque(maxlen=STRIKES))
        strikes.append(now)
        _trim(self._strikes)
        if len(strikes) == STRIKES and now - strikes[0] < STRIKES_S:
            del self._strikes[peer]
            self._suspended[peer] = now + SUSPENDED_S
            _trim(self._suspended)
        return True

    def actors(self) -> frozenset[str]:
        """Names of the actors that are there."""
        return frozenset(
            peer.name
            for peer in self._peers.values()
            if peer.name.startswith(ACTOR_NAMES) and not (peer.is_fenced or peer.is_silent)
        )

    def forget_silent(self, now: float) -> list[str]:
        """Do not count those any more who were not heard of for long. Gives the names of those who counted until now.

        One that speaks again counts again, unless a later process has its place.
        """
        silent = [
            peer
            for peer in self._peers.values()
            if not (peer.is_silent or peer.is_fenced) and now - peer.heard >= self._silent_s
        ]
        for peer in silent:
            peer.is_silent = True
        return [peer.name for peer in silent]

    def _forget(self, peer: bytes, known: _Peer | None) -> None:
        if known is not None and self._latest.get(known.name) == peer:
            del self._latest[known.name]

    def _check_hello(self, hello: Hello) -> None:
        if hello.protocol != PROTOCOL:
            raise RefusedError(
                Refusal.PROTOCOL,
                f"{hello.name} speaks protocol {hello.protocol}, replay {PROTOCOL}; use one version of the program",
                retry=False,
            )
        own, its = self._config_digest, hello.config_digest
        for what, ours, theirs, matters in (
            ("run", self._run_id, hello.run_id, True),
            ("config.yaml", own, its, own),
            (
                "tokenizer.json",
                self._tokenizer_digest,
                hello.tokenizer_digest,
                self._tokenizer_digest and hello.tokenizer_digest,
            ),
        ):
            if matters and ours != theirs:
                raise RefusedError(
                    Refusal.WRONG_RUN,
                    f"{hello.name} is of {what} {theirs or '(none)'}, replay is of {what} {ours}",
                    retry=False,
                )

    def _check_fenced(self, peer: bytes) -> None:
        known = self._peers.get(peer)
        if known is not None and known.is_fenced:
            raise RefusedError(
                Refusal.FENCED, f"a later process named {known.name} has its place", retry=False
            )

    def _check_suspended(self, peer: bytes, now: float) -> None:
        until = self._suspended.get(peer)
        if until is None:
            return
        if now >= until:
            del self._suspended[peer]
            return
        raise RefusedError(
            Refusal.SUSPENDED,
            f"{STRIKES} messages of {self.name_of(peer)} were invalid within {STRIKES_S:g} s",
            retry=True,
            retry_after_s=until - now,
        )


def _trim(known: dict[bytes, T]) -> list[tuple[bytes, T]]:
    """Forget what was learnt first, beyond `MAX_PEERS`. Gives what was forgotten."""
    forgotten = []
    while len(known) > MAX_PEERS:
        peer = next(iter(known))
        forgotten.append((peer, known.pop(peer)))
    return forgotten
