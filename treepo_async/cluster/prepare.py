"""What a run needs before its roles start: the model's folder and the run's folder."""

import time
from collections.abc import Callable
from pathlib import Path

from treepo_async.config.command_line import to_yaml
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError
from treepo_async.tiny.cache import prepare

TINY = "tiny"


def prepare_model(
    path: str, *, cache_dir: Path, seed: int, report: Callable[[int, int, float], None]
) -> Path:
    """The folder of the initial model: a local one, the tiny one (trained if needed), or a downloaded one.

    Raises:
        ConfigError: there is no such folder, and no model of that name can be had.
    """
    if path == TINY:
        return prepare(cache_dir, seed, report)
    folder = Path(path)
    if folder.is_dir():
        return folder
    if path.count("/") != 1:
        raise ConfigError(
            f"model.path={path} is no folder, not 'tiny', and no hub id of the form owner/name"
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


def prepare_run_dir(config: Config) -> Path:
    """Create the run's folder and save the resolved config in it.

    Raises:
        ConfigError: the folder holds another run already.
    """
    run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if (run_dir / "config.yaml").exists():
        raise ConfigError(
            f"run_dir={run_dir} holds a run already, and runs cannot be resumed yet; name another folder"
        )
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    return run_dir
