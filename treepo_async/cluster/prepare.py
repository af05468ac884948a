"""What a run needs before its roles start: the model's folder and the run's folder."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from treepo_async.config.command_line import to_yaml
from treepo_async.config.layout import Layout
from treepo_async.config.limits import ARCHITECTURES, context_length, prompt_limit, response_limit
from treepo_async.config.schema import Config
from treepo_async.config.wiring import CONFIG_FILE
from treepo_async.data.source import PromptSource, open_source
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import ConfigError, DataError
from treepo_async.learner.shape import ModelShape, check_split
from treepo_async.scoring.registry import get_scorer
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.cache import prepare
from treepo_async.types import Prompt

MAX_TRIED = 100
"""Training prompts that are tried before the data counts as unusable."""


def prepare_model(
    path: str, *, cache_dir: Path, seed: int, report: Callable[[int, int, float], None]
) -> Path:
    """The folder of the initial model: a local one, a built-in one (trained if needed), or a downloaded one.

    Raises:
        ConfigError: there is no such folder, and no model of that name can be had.
    """
    if path in BUILT_INS:
        return prepare(cache_dir, seed, report, BUILT_INS[path])
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.count("/") != 1:
        raise ConfigError(
            f"model.path={path} is no folder, not {' or '.join(BUILT_INS)}, and no hub id of the form owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path={path} cannot be downloaded: {error}; give a local folder"
        ) from error


def try_inputs(config: Config, model_dir: Path, model: Mapping[str, Any]) -> Prompt:
    """Open data, tokenizer and scorer as the roles will, and see whether the model fits the layout, before they start.

    Returns:
        A prompt as the engine will get it.

    Raises:
        ConfigError, DataError: naming the key, and what would do.
    """
    layout = Layout.parse(config.learner.layout)
    check_split(ModelShape.from_config(model), tp=layout.tp, pp=layout.pp)
    get_scorer(config.reward.scorer)
    source = open_source(
        config.data,
        tokenizer=TextTokenizer.load(model_dir),
        seed=config.seed,
        max_prompt_tokens=prompt_limit(config, model),
    )
    if config.eval.every and not source.heldout(1):
        raise DataError(
            f"data.path={config.data.path} has no held-out problem; give data.eval_path"
        )
    return _first_usable(source)


def _first_usable(source: PromptSource) -> Prompt:
    """The first training prompt that does not raise; the first reason when none of many can be used."""
    reasons = []
    for index in range(MAX_TRIED):
        try:
            return source.prompt(index)
        except DataError as error:
            reasons.append(str(error))
    raise DataError(f"none of the first {MAX_TRIED} prompts can be used: {reasons[0]}")


def choose_run_dir(wanted: str | None) -> Path:
    """The run's folder, not made yet.

    Args:
        wanted: the key `run_dir`; None names a folder by the time.
    """
    return Path(wanted or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")


def make_run_dir(run_dir: Path, config: Config, model: Mapping[str, Any]) -> None:
    """Make the run's folder and save the config in it, with what it left open filled in.

    Args:
        run_dir: new, or of the run that is resumed.
        config: of the run.
        model: the model's `config.json`.
    """
    resolved = replace(
        config,
        run_dir=str(run_dir),
        tree=replace(config.tree, max_response_tokens=response_limit(config)),
        engine=replace(config.engine, context_length=context_length(config, model)),
    )
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    temporary = run_dir / ".config.yaml"
    temporary.write_text(to_yaml(resolved))
    # by one rename: a file that is cut off would be read as other values
    temporary.replace(run_dir / CONFIG_FILE)


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        ConfigError: it is missing, or of an architecture that cannot be trained.
    """
    file = model_dir / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path: {model_dir} has no config.json")
    model: dict[str, Any] = json.loads(file.read_text())
    found = model.get("architectures")
    if not set(found or []) & set(ARCHITECTURES):
        raise ConfigError(
            f"model.path: {model_dir} is {found}; trained are {', '.join(ARCHITECTURES)}"
        )
    return model
