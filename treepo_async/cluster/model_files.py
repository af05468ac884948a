"""The files of a model beside its weights: config, tokenizer, generation config. For who plans or exports without running.

Neighbours: `prepare` gets a model whole, for a run; `launch/run.py --dry-run` and `export` need no more than this.
"""

from collections.abc import Callable
from pathlib import Path

from treepo_async.cluster.prepare import prepare_model
from treepo_async.config.command_line import CONFIG_DIR
from treepo_async.errors import ConfigError
from treepo_async.tiny.built_in import BUILT_INS

SHIPPED_DIR = CONFIG_DIR / "models"
"""Folders `owner/name`, each with the config.json of the model of that hub id."""
WITHOUT_WEIGHTS = ["*.json", "*.jinja", "*.txt", "*.model"]


def find_files(
    path: str,
    *,
    cache_dir: Path,
    seed: int,
    report: Callable[[int, int, float], None],
    shipped: bool = False,
) -> Path:
    """A folder with a model's config.json and, unless it is a shipped one, its tokenizer.

    A hub id is looked up in the local cache, then among the shipped configs, then on the hub.

    Args:
        path: as `model.path`.
        cache_dir: of the built-in models.
        seed: of the warm start of a built-in model.
        report: see `prepare_model`.
        shipped: whether a config.json that comes with this project will do.

    Raises:
        ConfigError: there is no such folder, and no model of that name can be had.
    """
    if path in BUILT_INS or Path(path).is_dir() or path.count("/") != 1:
        return prepare_model(path, cache_dir=cache_dir, seed=seed, report=report)
    cached = _from_hub(path, offline=True)
    if isinstance(cached, Path):
        return cached
    own = SHIPPED_DIR / path
    if shipped and (own / "config.json").is_file():
        return own
    fetched = _from_hub(path, offline=False)
    if isinstance(fetched, Path):
        return fetched
    raise ConfigError(
        f"model.path={path}: its config.json cannot be downloaded: {fetched}; give a local folder"
    ) from fetched


def has_tokenizer(model_dir: Path) -> bool:
    """Whether prompts can be made with the files of a folder."""
    return (model_dir / "tokenizer.json").is_file()


def _from_hub(path: str, *, offline: bool) -> Path | Exception:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(path, allow_patterns=WITHOUT_WEIGHTS, local_files_only=offline)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        return error
    return folder if (folder / "config.json").is_file() else FileNotFoundError(folder)
