"""The key that an SGLang server asks of its clients, in a file that its owner alone can read.

One of a run is made at random by whichever role needs it first. SGLang reads the same file as its `--config`, so that the
key is in no command line. Clients send it with every request, as a header of their HTTP session. Of a server that
somebody else runs, the file (`engine.api_key_file`) may also hold the bare key.
"""

import os
import re
import secrets
import stat
from pathlib import Path

from treepo_async.config.schema import EngineConfig
from treepo_async.errors import ConfigError

_LINE = re.compile(r'(?:api-key:\s*)?"?(?P<key>[!-~]+?)"?\s*')


def ensure_key(file: Path) -> str:
    """The key in a file, made if there is none yet; of several processes that want to make it, one does.

    Raises:
        ConfigError: the file is open to other users, or holds no key.
    """
    if not file.exists():
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as out:
            out.write(f'api-key: "{secrets.token_hex(16)}"\n')
        try:
            # unlike a rename, it does not put another key in the place of one that is used already
            os.link(temporary, file)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return read_key(file)


def read_key(file: Path) -> str:
    """The key in a file.

    Raises:
        ConfigError: it cannot be read, is open to other users, or holds no key.
    """
    try:
        text, mode = file.read_text(), file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the engine's key cannot be read: {error}; see engine.api_key_file"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{file} is open to other users; run: chmod 600 {file}")
    match = _LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{file} holds no key; write the key alone, or api-key: KEY")
    return match["key"]


def key_for_run(config: EngineConfig, own_file: Path) -> str | None:
    """What the engines of a run ask of their clients: the run's own key, or that of whoever runs the servers at `engine.url`.

    Args:
        config: the section of the run's config.
        own_file: of the run's own key, made if there is none yet.

    Raises:
        ConfigError: the file is open to other users, or holds no key.
    """
    if config.url is None:
        return ensure_key(own_file)
    return None if config.api_key_file is None else read_key(Path(config.api_key_file))


def bearer(key: str | None) -> dict[str, str]:
    """The HTTP headers that show a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
