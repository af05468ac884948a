"""Ray's runtime environment of the hosts on a cluster that was there before: what a person wrote, and what the roles need."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from treepo_async.errors import ConfigError

CARRIES_CODE = ("working_dir", "py_modules")
"""Keys with which Ray itself brings source to a node, and puts it on the path."""


def load_runtime_env(file: str | None) -> dict[str, Any]:
    """What a person wrote in a file, JSON or YAML; nothing without a file.

    Raises:
        ConfigError: it cannot be read, or holds no mapping.
    """
    if file is None:
        return {}
    try:
        text = Path(file).read_text()
        # each text in JSON is one in YAML too, but for tabs between its words
        found = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"cluster.runtime_env={file} cannot be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("env_vars", {}), dict):
        raise ConfigError(
            f"cluster.runtime_env={file} holds no mapping with Ray's keys, such as env_vars or working_dir"
        )
    return found


def runtime_env_of(
    written: Mapping[str, Any], variables: Mapping[str, str], *, root: Path
) -> dict[str, Any]:
    """The runtime environment of every host.

    Args:
        written: what a person wrote; it wins.
        variables: of the driver that every role has too.
        root: folder of this package on the driver's machine, for nodes that mount it too; it comes first on the path.
    """
    env_vars = {**variables, **written.get("env_vars", {})}
    if not any(key in written for key in CARRIES_CODE):
        theirs = str(env_vars.get("PYTHONPATH", ""))
        env_vars["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [theirs])])
    return {**written, "env_vars": {name: str(value) for name, value in env_vars.items()}}
