"""CURVE keys of a run: a folder of files, made once, copied to the machines that need them, never sent.

    server.key             public key of replay and of the engine hosts: every machine needs it
    server.key_secret      their secret: only machines that run one of them
    <name>.key_secret      both keys of a client: of the role of that name, e.g. `actor-0`, or `client` for all others
    allowed/<name>.key     public keys of the clients that are let in; without its file a client is refused at its next
                           connection

Secrets are readable by their owner alone, else they are refused. Whoever has a client's secret may lease, and deliver
trees; whoever has the server's may pretend to be replay.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth import load_certificate

from treepo_async.errors import ConfigError

SERVER, CLIENT = "server", "client"
ALLOWED = "allowed"
"""Folder of the clients that are let in."""
SECRET, PUBLIC = ".key_secret", ".key"
_MAKE = "python launch/keys.py DIR makes one"


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """What a socket that is bound needs."""

    public: bytes
    secret: bytes
    allowed: Path
    """Folder of the public keys that are let in."""

    def __repr__(self) -> str:
        return f"ServerKeys({self.allowed.parent})"


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a socket that connects needs."""

    public: bytes
    secret: bytes
    server_public: bytes

    def __repr__(self) -> str:
        return f"ClientKeys({self.public.decode()})"


def make_keys(folder: Path, names: Sequence[str] = (CLIENT,)) -> list[Path]:
    """Make the keys of a run: the server's, and those of clients. Gives the files written.

    Args:
        folder: where the server's keys are already, only those of clients are made.
        names: of the clients.

    Raises:
        ConfigError: a client of that name has keys already, the name is no file name, or half of the server's keys is gone.
    """
    for name in names:
        if not name.replace("-", "").replace("_", "").isalnum() or name == SERVER:
            raise ConfigError(f"{name!r} cannot name a client; use letters, digits, - and _")
        if (folder / f"{name}{SECRET}").exists() or (folder / ALLOWED / f"{name}{PUBLIC}").exists():
            raise ConfigError(
                f"{folder} has keys of {name} already; remove them, or give another name"
            )
    has_secret, has_public = ((folder / f"{SERVER}{end}").exists() for end in (SECRET, PUBLIC))
    if has_secret != has_public:
        raise ConfigError(
            f"{folder} has only one of the server's two keys; remove it, or find the other"
        )
    (folder / ALLOWED).mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    written = []
    if not has_secret:
        written += _make_pair(folder, SERVER, public_in=folder)
    for name in names:
        written += _make_pair(folder, name, public_in=folder / ALLOWED)
    return written


def server_keys(folder: str | None) -> ServerKeys | None:
    """The keys of a bound socket; None without a folder.

    Raises:
        ConfigError: they are missing, damaged, or open to others.
    """
    if folder is None:
        return None
    root = Path(folder)
    public, secret = _load_secret(root / f"{SERVER}{SECRET}")
    allowed = root / ALLOWED
    if not allowed.is_dir():
        raise ConfigError(f"cluster.keys_dir={folder} has no folder {ALLOWED}; {_MAKE}")
    for place in (root, allowed):
        if place.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise ConfigError(f"others may write to {place}; run: chmod go-w {place}")
    return ServerKeys(public, secret, allowed)


def client_keys(folder: str | None, name: str) -> ClientKeys | None:
    """The keys of a socket that connects: those of its name, else those for all; None without a folder.

    Raises:
        ConfigError: they are missing, damaged, or open to others.
    """
    if folder is None:
        return None
    root = Path(folder)
    server_public, _ = _load(root / f"{SERVER}{PUBLIC}")
    own = root / f"{name}{SECRET}"
    public, secret = _load_secret(own if own.exists() else root / f"{CLIENT}{SECRET}")
    return ClientKeys(public, secret, server_public)


def is_allowed(folder: Path, public: bytes) -> bool:
    """Whether the allow-list has a client's public key now."""
    for file in folder.glob(f"*{PUBLIC}"):
        try:
            if load_certificate(file)[0] == public:
                return True
        except (OSError, ValueError):
            # a file that is just being written or removed lets nobody in
            continue
    return False


def _make_pair(folder: Path, name: str, *, public_in: Path) -> list[Path]:
    public, secret = zmq.curve_keypair()
    files = (
        (folder / f"{name}{SECRET}", 0o600, f'    secret-key = "{secret.decode()}"\n'),
        (public_in / f"{name}{PUBLIC}", 0o644, ""),
    )
    for file, mode, secret_line in files:
        # created with its mode, so that a secret is at no time open to others, and never over another file
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "w") as out:
            out.write(f'curve\n    public-key = "{public.decode()}"\n{secret_line}')
    return [file for file, _, _ in files]


def _load_secret(file: Path) -> tuple[bytes, bytes]:
    public, secret = _load(file)
    if file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{file} is open to other users; run: chmod 600 {file}")
    if secret is None:
        raise ConfigError(f"{file} holds no secret key; {_MAKE}")
    return public, secret


def _load(file: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cluster.keys_dir: {file} cannot be read as a key ({error}); {_MAKE}"
        ) from error
    if any(key is not None and len(key) != 40 for key in (public, secret)):
        raise ConfigError(f"cluster.keys_dir: {file} holds a damaged key; {_MAKE}")
    return public, secret
