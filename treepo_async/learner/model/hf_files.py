"""Tensors of safetensors files, by name, a part of one at a time. Neighbour: `hf` cuts what it gives."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from treepo_async.errors import ConfigError
from treepo_async.learner.model.hf import Read

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def open_checkpoint(model_dir: Path) -> Read:
    """Reader of single tensors of a checkpoint of one safetensors file or several with an index.

    Raises:
        ConfigError: the directory has neither, and from the reader: a tensor is missing.
    """
    index = model_dir / INDEX_FILE
    if index.is_file():
        files: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        return _reader({name: model_dir / file for name, file in files.items()}, model_dir)
    if not (model_dir / SINGLE_FILE).is_file():
        raise ConfigError(
            f"{model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face model directory"
        )
    return open_file(model_dir / SINGLE_FILE)


def open_file(file: Path) -> Read:
    """Reader of the tensors of one file.

    Raises:
        ConfigError: from the reader: a tensor is missing.
    """
    with safe_open(file, "pt") as tensors:
        names = tensors.keys()
    return _reader(dict.fromkeys(names, file), file)


def _reader(files: Mapping[str, Path], where: Path) -> Read:
    # mapped into memory, so that slicing reads only what the slice needs
    mapped = cache(lambda file: safe_open(file, "pt"))

    def read(name: str) -> Any:
        if name not in files:
            raise ConfigError(
                f"{where} has no tensor {name!r}; it is damaged or of another model than config.json"
            )
        return mapped(files[name]).get_slice(name)

    return read
