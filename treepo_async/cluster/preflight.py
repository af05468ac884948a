"""What each node of a cluster must have before a run starts there: the same program, the run's folder, model, data and keys.

    driver: Question -> host of each node: look() -> Sight -> driver: failures()

The driver writes a random word into the run's folder and into `weights.dir`, and a node that reads another one, or none, does not share them. The answers
are compared here, so that every failure is told at once, with its node and the way out. Neighbours: `hosts` asks, `role` carries.
"""

import hashlib
import os
import platform
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from treepo_async.config.schema import BUILT_IN, Config
from treepo_async.config.wiring import digest_of
from treepo_async.errors import ConfigError
from treepo_async.wire.keys import client_keys, server_keys

WORD_FILE = ".preflight"
"""In folders that nodes share, while they are looked at."""
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_MEMORY = 2**28
"""Bytes without which SGLang and NCCL fail in odd ways; containers often have 64 MiB."""
SERVERS = ("replay", "engine")
"""Roles that bind a socket, which takes the server's secret."""
PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Question:
    """What a node is asked about; all of these are paths that must hold the same everywhere."""

    run_dir: str
    weights_dir: str | None
    """Where the learner publishes and engines load, if that is not in the run's folder."""
    model_dir: str
    files: tuple[str, ...]
    """Of data."""
    keys_dir: str | None
    roles: tuple[str, ...]
    """Names of those there, for the keys that they need."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a node has."""

    python: str
    program: str
    """Digest of this package's source."""
    word: str
    """In the run's folder; empty where there is none."""
    weights_word: str
    """In the folder of the publications, likewise."""
    model: str
    """Digest of the model's `config.json`; empty where there is none."""
    sizes: tuple[int, ...]
    """Bytes of each file of data, -1 where it is missing."""
    keys_trouble: str
    """Why the keys cannot be used; empty where they can."""
    shared_memory: int
    """Bytes of /dev/shm."""


def question_of(
    config: Config, *, run_dir: Path, model_dir: Path, roles: Sequence[str]
) -> Question:
    """What to ask a node of a run.

    Args:
        config: of the run.
        run_dir: of the run.
        model_dir: the initial model.
        roles: names of those on the node.
    """
    data, keys_dir = config.data, config.cluster.keys_dir
    named = [file for file in (data.path, data.eval_path, data.trees) if file is not None]
    # a dataset of the hub is no file here, and is left to the roles
    files = [Path(file) for file in named if file not in BUILT_IN and Path(file).exists()]
    weights = config.weights
    by_folder = weights.dir if weights.transport == "disk" else None
    return Question(
        run_dir=str(run_dir.resolve()),
        weights_dir=None if by_folder is None else str(Path(by_folder).resolve()),
        model_dir=str(model_dir.resolve()),
        files=tuple(str(file.resolve()) for file in files),
        keys_dir=None if keys_dir is None else str(Path(keys_dir).resolve()),
        roles=tuple(roles),
    )


def leave_word(question: Question) -> str:
    """Write a random word into the folders that all nodes must share. Gives it.

    Raises:
        ConfigError: `weights.dir` cannot be written.
    """
    word = secrets.token_hex(8)
    (Path(question.run_dir) / WORD_FILE).write_text(word)
    if question.weights_dir is not None:
        folder = Path(question.weights_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WORD_FILE).write_text(word)
        except OSError as error:
            raise ConfigError(f"weights.dir={folder} cannot be written: {error}") from error
    return word


def look(question: Question) -> Sight:
    """Look around on this node."""
    return Sight(
        python=platform.python_version(),
        program=program_digest(),
        word=_read(Path(question.run_dir) / WORD_FILE),
        weights_word=_read(Path(question.weights_dir or question.run_dir) / WORD_FILE),
        model=digest_of(Path(question.model_dir) / "config.json"),
        sizes=tuple(_size(Path(file)) for file in question.files),
        keys_trouble=_keys_trouble(question),
        shared_memory=_shared_memory(),
    )


def failures(question: Question, word: str, own: Sight, seen: Mapping[str, Sight]) -> Iterator[str]:
    """What keeps a run from starting, one line each.

    Args:
        question: that was asked, whatever the roles.
        word: that `leave_word` wrote.
        own: what the driver's machine has.
        seen: what each node has, by its name.
    """
    for node, sight in seen.items():
        for text in _failures_of(question, word, own, sight):
            yield f"node {node}: {text}"


def _failures_of(question: Question, word: str, own: Sight, sight: Sight) -> Iterator[str]:
    if sight.python.rpartition(".")[0] != own.python.rpartition(".")[0]:
        yield (
            f"Python is {sight.python}, the driver's is {own.python}; install the same minor version on every node"
        )
    if sight.program != own.program:
        yield (
            "the source of treepo_async differs from the driver's; bring every node to the same commit, or have Ray "
            "carry it: cluster.runtime_env with working_dir"
        )
    if sight.word != word:
        yield (
            f"run_dir={question.run_dir} is not the driver's folder; put it on a file system that every node mounts "
            "under the same path"
        )
    if question.weights_dir is not None and sight.weights_word != word:
        yield (
            f"weights.dir={question.weights_dir} is not the driver's folder; name one on a file system that every node "
            "mounts under the same path, or give weights.transport=broadcast"
        )
    if sight.model != own.model:
        yield (
            f"model.path: {question.model_dir} is missing, or another model; put it on a file system that every node "
            "mounts under the same path (cache_dir for built-in models)"
        )
    for file, size, wanted in zip(question.files, sight.sizes, own.sizes, strict=True):
        if size != wanted:
            yield f"data: {file} {_differs(size, wanted)}; copy it there, or put it on a shared file system"
    if sight.keys_trouble:
        yield sight.keys_trouble
    if sight.shared_memory < LEAST_SHARED_MEMORY:
        yield (
            f"{SHARED_MEMORY} has {sight.shared_memory >> 20} MiB, {LEAST_SHARED_MEMORY >> 20} are needed; give the "
            "container more: --shm-size, or a memory volume on /dev/shm"
        )


def _differs(size: int, wanted: int) -> str:
    return "is missing" if size < 0 else f"has {size:,} bytes, the driver's {wanted:,}"


def program_digest(package: Path = PACKAGE) -> str:
    """Of every Python file of this package, by name and content."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(package.rglob("*.py")):
        found.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _size(file: Path) -> int:
    """Of a file, or of all files of a folder."""
    try:
        if file.is_dir():
            return sum(inner.stat().st_size for inner in file.rglob("*") if inner.is_file())
        return file.stat().st_size
    except OSError:
        return -1


def _keys_trouble(question: Question) -> str:
    try:
        for role in question.roles:
            if role.startswith(SERVERS):
                server_keys(question.keys_dir)
            else:
                client_keys(question.keys_dir, role)
    except (ConfigError, OSError) as error:
        return str(error)
    return ""


def _shared_memory() -> int:
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return 0
    return found.f_frsize * found.f_blocks
