"""From `key=value` words and YAML files to a checked `Config`, and back to `--help` and YAML.

Later words win over earlier ones, words over YAML, YAML over the defaults in `schema`.
"""

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from treepo_async.config.schema import Config, knobs
from treepo_async.config.validate import validate
from treepo_async.errors import ConfigError

SHORT_FORMS = {"learner": "learner.layout", "model": "model.path", "data": "data.path"}
"""`learner=tp4pp2` sets `learner.layout`; a section cannot be given a value otherwise."""

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

_KEYS = tuple(key for key, _ in knobs(Config))
_SECTIONS = {key.partition(".")[0] for key in _KEYS if "." in key}


def parse(words: Sequence[str]) -> Config:
    """Read the command line's words into a validated config.

    Args:
        words: `key=value`, and `config=NAME` or `config=FILE` for a YAML file.

    Raises:
        ConfigError: a word that is no `key=value`, an unknown key, a value of the wrong type, a
            combination that cannot be run.
    """
    merged = OmegaConf.structured(Config)
    files, dotlist = _split(words)
    for file in files:
        with _blaming(str(file)):
            merged = _merge(merged, _load_yaml(file), source=str(file))
    for word in dotlist:
        with _blaming(word):
            merged = _merge(merged, OmegaConf.from_dotlist([word]), source=word)
    with _blaming("config"):
        config = cast("Config", OmegaConf.to_object(merged))
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The config as YAML that `config=FILE` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(file: Path) -> Config:
    """Read a resolved config that `to_yaml` wrote.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds unknown keys.
    """
    return parse([f"config={file}"])


def describe() -> str:
    """The `--help` text: every key, its default and what it means."""
    lines = ["usage: python launch/run.py [config=NAME|FILE] [key=value ...] [--dry-run]", ""]
    for key, knob in knobs(Config):
        lines.append(f"  {key + '=' + json.dumps(knob.default):<44} {knob.metadata['help']}")
    lines += [
        "",
        "short forms: " + ", ".join(f"{k}=... is {v}=..." for k, v in SHORT_FORMS.items()),
    ]
    lines += ["exit codes: 0 done, 1 a role failed, 2 a bad key or value, 130 stopped by Ctrl-C"]
    return "\n".join(lines)


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    files, dotlist = [], []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not key=value; see --help for the keys")
        if key == "config":
            files.append(_find_yaml(value))
        else:
            dotlist.append(f"{SHORT_FORMS.get(key, key)}={value}")
    return files, dotlist


def _find_yaml(name: str) -> Path:
    for candidate in (Path(name), CONFIG_DIR / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(f.stem for f in CONFIG_DIR.glob("*.yaml"))
    raise ConfigError(f"config={name}: no such file, and configs/ has {', '.join(known) or 'none'}")


def _load_yaml(file: Path) -> DictConfig:
    loaded = OmegaConf.load(file)
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{file} holds no mapping of keys to values")
    return loaded


def _merge(base: DictConfig, update: DictConfig, *, source: str) -> DictConfig:
    for key, value in update.items():
        # OmegaConf's own message for a section set to a value does not name the key
        if key in _SECTIONS and not isinstance(value, DictConfig):
            raise ConfigError(f"{source}: {_explain(str(key), '')}")
    return cast("DictConfig", OmegaConf.merge(base, update))


@contextlib.contextmanager
def _blaming(source: str) -> Iterator[None]:
    """Tell what the config libraries raise inside as a ConfigError of `source`."""
    try:
        yield
    except OmegaConfBaseException as error:
        reason = (error.msg or str(error)).splitlines()[0]
        raise ConfigError(f"{source}: {_explain(error.full_key or '', reason)}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from error


def _explain(key: str, reason: str) -> str:
    if key in _KEYS:
        return f"{key}: {reason}"
    if key in _SECTIONS:
        example = next(known for known in _KEYS if known.startswith(f"{key}."))
        return f"{key} is a section, set one of its keys, e.g. {example}; see --help"
    same_name = [known for known in _KEYS if known.rpartition(".")[2] == key]
    close = same_name or difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --help for the keys"
    return f"unknown key {key}; {hint}" if key else reason
