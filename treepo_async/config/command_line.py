"""From `key=value` words and YAML files to a checked config, and back to `--help` and YAML.

Later words win over earlier ones, words over YAML, YAML over the defaults in `schema`. A run has a `Config`, a
stand-alone actor a `GenerateConfig`.
"""

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from treepo_async.config.schema import AnyConfig, Config, GenerateConfig, knobs
from treepo_async.config.validate import TRAINING_DATA, validate
from treepo_async.errors import ConfigError

SHORT_FORMS = {"learner": "learner.layout", "model": "model.path", "data": "data.path"}
"""`learner=tp4pp2` sets `learner.layout`; a section cannot be given a value otherwise."""

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

C = TypeVar("C", Config, GenerateConfig)


@dataclass(frozen=True, slots=True)
class _Keys:
    """What can be set."""

    names: tuple[str, ...]
    sections: frozenset[str]

    @classmethod
    def of(cls, schema: type[Any]) -> Self:
        names = tuple(key for key, _ in knobs(schema))
        return cls(names, frozenset(key.partition(".")[0] for key in names if "." in key))


_RUN_KEYS = _Keys.of(Config)


def parse(words: Sequence[str]) -> Config:
    """Read the command line's words into the validated config of a run.

    Args:
        words: `key=value`, and `config=NAME` or `config=FILE` for a YAML file.

    Raises:
        ConfigError: a word that is no `key=value`, an unknown key, a value of the wrong type, a
            combination that cannot be run.
    """
    return _parse(words, Config)


def parse_generation(words: Sequence[str]) -> GenerateConfig:
    """The same for a stand-alone actor; what a file says about training is passed over.

    Raises:
        ConfigError: as `parse`.
    """
    return _parse(words, GenerateConfig)


def _parse(words: Sequence[str], schema: type[C]) -> C:
    keys = _Keys.of(schema)
    merged = OmegaConf.structured(schema)
    files, dotlist = _split(words, keys)
    for file in files:
        with _blaming(str(file), keys):
            loaded = _load_yaml(file)
            if schema is GenerateConfig:
                loaded = _without_training(loaded, keys)
            merged = _merge(merged, loaded, str(file), keys)
    for word in dotlist:
        with _blaming(word, keys):
            merged = _merge(merged, OmegaConf.from_dotlist([word]), word, keys)
    with _blaming("config", keys):
        config = cast(C, OmegaConf.to_object(merged))
    validate(config)
    return config


def to_yaml(config: AnyConfig) -> str:
    """The config as YAML that `config=FILE` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(file: Path) -> Config:
    """Read a resolved config that `to_yaml` wrote.

    Raises:
        ConfigError: the file is missing, is no YAML, or holds unknown keys.
    """
    return parse([f"config={file}"])


def describe() -> str:
    """The `--help` text of a run: every key, its default and what it means."""
    usage = (
        "python launch/run.py [config=NAME|FILE] [key=value ...] "
        "[--dry-run [--gpu-gib=80] [--nodes=4x8]]"
    )
    exits = "0 done, 1 a role failed, 2 a bad key or value, 130 stopped by Ctrl-C"
    return _describe(Config, usage, exits)


def describe_generation() -> str:
    """The `--help` text of a stand-alone actor."""
    usage = "python launch/actor.py data=IN out=OUT [model=PATH] [config=NAME|FILE] [key=value ...]"
    exits = "0 done, 1 the engine failed, 2 a bad key, value or file, 130 stopped by Ctrl-C"
    return _describe(GenerateConfig, usage, exits)


def _describe(schema: type[Any], usage: str, exits: str) -> str:
    lines = [f"usage: {usage}", ""]
    for key, knob in knobs(schema):
        lines.append(f"  {key + '=' + json.dumps(knob.default):<44} {knob.metadata['help']}")
    short = [f"{k}=... is {v}=..." for k, v in _short_forms(_Keys.of(schema)).items()]
    return "\n".join([*lines, "", f"short forms: {', '.join(short)}", f"exit codes: {exits}"])


def _short_forms(keys: _Keys) -> dict[str, str]:
    return {short: key for short, key in SHORT_FORMS.items() if key in keys.names}


def _split(words: Sequence[str], keys: _Keys) -> tuple[list[Path], list[str]]:
    files, dotlist = [], []
    short_forms = _short_forms(keys)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not key=value; see --help for the keys")
        if key == "config":
            files.append(_find_yaml(value))
        else:
            dotlist.append(f"{short_forms.get(key, key)}={value}")
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


def _without_training(loaded: DictConfig, keys: _Keys) -> DictConfig:
    """A run's file without what only a run has."""
    foreign = {key.partition(".")[0] for key in _RUN_KEYS.names if key not in keys.names}
    own = {key.partition(".")[0] for key in keys.names}
    kept = {key: value for key, value in loaded.items_ex(resolve=False) if key not in foreign - own}
    data = kept.get("data")
    if isinstance(data, DictConfig):
        items = data.items_ex(resolve=False)
        kept["data"] = {key: value for key, value in items if key not in TRAINING_DATA}
    return OmegaConf.create(kept)


def _merge(base: DictConfig, update: DictConfig, source: str, keys: _Keys) -> DictConfig:
    for key, value in update.items():
        # OmegaConf's own message for a section set to a value does not name the key
        if key in keys.sections and not isinstance(value, DictConfig):
            raise ConfigError(f"{source}: {_explain(str(key), '', keys)}")
    return cast("DictConfig", OmegaConf.merge(base, update))


@contextlib.contextmanager
def _blaming(source: str, keys: _Keys) -> Iterator[None]:
    """Tell what the config libraries raise inside as a ConfigError of `source`."""
    try:
        yield
    except OmegaConfBaseException as error:
        reason = (error.msg or str(error)).splitlines()[0]
        raise ConfigError(f"{source}: {_explain(error.full_key or '', reason, keys)}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}") from error


def _explain(key: str, reason: str, keys: _Keys) -> str:
    if key in keys.names:
        return f"{key}: {reason}"
    if key in keys.sections:
        example = next(known for known in keys.names if known.startswith(f"{key}."))
        return f"{key} is a section, set one of its keys, e.g. {example}; see --help"
    if key in _RUN_KEYS.names or key in _RUN_KEYS.sections:
        return f"{key} is a key of training (launch/run.py); here nothing is trained, leave it out"
    same_name = [known for known in keys.names if known.rpartition(".")[2] == key]
    close = same_name or difflib.get_close_matches(key, keys.names, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "see --help for the keys"
    return f"unknown key {key}; {hint}" if key else reason
