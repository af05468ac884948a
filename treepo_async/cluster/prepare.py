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
from treepo_async.replay.feed import check_length
from treepo_async.scoring.async_scorer import try_scorer
from treepo_async.tiny.built_in import BUILT_INS
from treepo_async.tiny.cache import prepare
from treepo_async.types import Prompt, Tree
from treepo_async.wire.tree_file import TreeFile

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
        A prompt as the engine will get it, or as it got it where the trees come from a file.

    Raises:
        ConfigError, DataError: naming the key, and what would do.
    """
    layout = Layout.parse(config.learner.layout)
    check_split(ModelShape.from_config(model), tp=layout.tp, pp=layout.pp)
    if config.data.trees is None:
        return _first_usable(_try_source(config, model_dir, model))
    if config.eval.every:
        _try_source(config, model_dir, model)
    return _first_tree(config, config.data.trees, model).prompt


def _try_source(config: Config, model_dir: Path, model: Mapping[str, Any]) -> PromptSource:
    try_scorer(config.reward.scorer)
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
    return source


def _first_tree(config: Config, path: str, model: Mapping[str, Any]) -> Tree:
    """The first tree of the file that is trained on."""
    trees = TreeFile(Path(path), vocab_size=model["vocab_size"])
    number, batch = len(trees) * (config.data.epochs or 1), config.replay.prompts_per_batch
    if number < batch:
        raise DataError(
            f"data.trees={path} has {len(trees)} trees, fewer than a batch of {batch}; lower "
            "replay.prompts_per_batch, or raise data.epochs"
        )
    try:
        tree = trees.tree(0)
        check_length(tree, model["max_position_embeddings"])
    except DataError as error:
        raise DataError(
            f"data.trees: {error}; give the trees of a model like {config.model.path}, or that model"
        ) from error
    return tree


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
    key_file = config.engine.api_key_file
    resolved = replace(
        config,
        run_dir=str(run_dir),
        tree=replace(config.tree, max_response_tokens=response_limit(config)),
        engine=replace(
            config.engine,
            context_length=context_length(config, model),
            # roles may have another working directory
            api_key_file=None if key_file is None else str(Path(key_file).resolve()),
        ),
    )
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    temporary = run_dir / ".config.yaml"
    temporary.write_text(to_yaml(resolved))
    # by one rename: a file that is cut off would be read as other values
    temporary.replace(run_dir / CONFIG_FILE)


def load_model_config(model_dir: Path) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        ConfigError: it is missing, or no JSON object.
    """
    file = model_dir / "config.json"
    if not file.is_file():
        raise ConfigError(f"model.path: {model_dir} has no config.json")
    try:
        model = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"model.path: {file} is not JSON: {error}; copy it again") from error
    if not isinstance(model, dict):
        raise ConfigError(f"model.path: {file} holds no JSON object; copy it again")
    return model


def read_model_config(model_dir: Path) -> dict[str, Any]:
    """The `config.json` of a model that shall be trained.

    Raises:
        ConfigError: as `load_model_config`, or it is of an architecture that cannot be trained.
    """
    model = load_model_config(model_dir)
    found = model.get("architectures")
    if not set(found or []) & set(ARCHITECTURES):
        raise ConfigError(
            f"model.path: {model_dir} is {found}; trained are {', '.join(ARCHITECTURES)}"
        )
    return model
