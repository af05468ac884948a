"""What a stand-alone actor's job is: all that decides which trees belong into its file.

A file may only be gone on with by the job that began it. `differences` says in words what is another one.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

from treepo_async.config.schema import BUILT_IN, GenerateConfig, knobs
from treepo_async.errors import DataError

FORMAT = 1
DECIDING = ("seed", "out_form", "model.dtype", "data.", "tree.", "prune.", "reward.")
"""Keys, and beginnings of keys, that decide what a tree is."""
HARMLESS = (
    "data.path",  # the data is known by its name and its content
    "data.eval_path",
    "data.epochs",
    "data.trees",
    "reward.timeout_s",
    "reward.workers",
)
"""Exceptions."""
NUM_BLOCKS, BLOCK_BYTES = 64, 2**16
"""What is read of a file of weights: hashing all of it would take minutes for a large model."""


@dataclass(frozen=True, slots=True)
class Job:
    """See the module."""

    keys: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    """Name and content of the source."""
    model: str = ""
    """Content of the model's folder."""
    prompt_limit: int = 0
    """Most tokens of a prompt; longer ones are skipped."""
    weights: str = ""
    """What the engine says of the weights that it has loaded; empty until it runs."""

    @classmethod
    def of(cls, config: GenerateConfig, model_dir: Path, prompt_limit: int) -> Self:
        """The job of a config."""
        keys = {
            key: attrgetter(key)(config)
            for key, _ in knobs(GenerateConfig)
            if key.startswith(DECIDING) and key not in HARMLESS
        }
        return cls(keys, data_digest(config.data.path), model_digest(model_dir), prompt_limit)

    def to_json(self) -> str:
        """As text that `parse` reads back."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is something else.
        """
        try:
            found = json.loads(text)
            if found.pop("format") != FORMAT:
                raise DataError(f"its format is not {FORMAT}")
            job = cls(**found)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"it describes no job: {error}") from error
        for name, default in asdict(cls()).items():
            value = getattr(job, name)
            if type(value) is not type(default):
                raise DataError(f"its {name} is {value!r:.80}, no {type(default).__name__}")
        return job

    def differences(self, earlier: "Job") -> Iterator[str]:
        """What is another one than in an earlier job, in words."""
        defaults = {key: knob.default for key, knob in knobs(GenerateConfig)}
        for key, value in self.keys.items():
            # a job of an earlier program has not heard of newer keys
            before = earlier.keys.get(key, defaults[key])
            if value != before:
                yield f"{key}={value} was {before}"
        for name in ("data", "model", "prompt_limit", "weights"):
            value, before = getattr(self, name), getattr(earlier, name)
            if value != before and value and before:
                yield f"{name}: {value} was {before}"


def data_digest(path: str) -> str:
    """Name and content of a data source; of a hub's dataset the name alone."""
    file = Path(path).expanduser()
    if path in BUILT_IN or not file.is_file():
        return path
    with file.open("rb") as content:
        return f"{file.name} sha256 {hashlib.file_digest(content, 'sha256').hexdigest()}"


def model_digest(folder: Path) -> str:
    """A hash over a model's folder: its JSON files and samples of its weights."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        digest.update(file.name.encode() + file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for block in range(NUM_BLOCKS):
                content.seek(size * block // NUM_BLOCKS)
                digest.update(content.read(BLOCK_BYTES))
    return f"sha256 {digest.hexdigest()}"
