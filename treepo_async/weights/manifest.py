"""The manifest of a publication: every tensor's name, shape, dtype and hash, and a probe of the policy.

An engine loads a partial file without complaint and dies of a wrong shape, so a publication is checked against its
manifest, and the manifest against the model, before an engine sees the folder.

Hashes are XXH3-128: they find damage (a torn write, a flipped bit, another tensor's bytes), as fast as memory is read. They are no
proof against somebody who means to deceive; whoever may write to the folder is trusted.
"""

import json
import mmap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

from treepo_async.errors import WeightsError

WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
PUBLISHED_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""How safetensors spells each `model.dtype`."""
TIED_HEAD = "lm_head.weight"
"""Not published where it is the embedding; some checkpoints store it all the same."""
NUM_THREADS = 4
"""That hash or write tensors of a file: one core moves fewer bytes than memory takes."""


UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading damaged JSON may raise."""


class TensorInfo(NamedTuple):
    """What a tensor must look like."""

    dtype: str
    """As safetensors spells it, e.g. `F32`."""
    shape: tuple[int, ...]


class _Entry(NamedTuple):
    """A tensor in a file: what it looks like, and its bytes counted from the end of the header."""

    info: TensorInfo
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Token sequences and the learner's log-probs of them: what an engine must answer with these weights."""

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    """Per sequence, log p of each token but the first, at temperature 1."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of one publication."""

    version: str
    tensors: dict[str, TensorInfo]
    hashes: dict[str, str]
    """Of the tensors in the folder; none where they go to the engines by a broadcast."""
    probe: Probe
    evaluate: bool
    """Whether the version shall be evaluated before the next one is applied."""
    published_at: float = 0.0
    """When the learner began to publish it, in seconds by its clock."""

    def to_json(self) -> str:
        """What `parse` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            One of `UNREADABLE`: it is no manifest.
        """
        raw = json.loads(text)
        return cls(
            version=raw["version"],
            tensors={n: TensorInfo(d, tuple(s)) for n, (d, s) in raw["tensors"].items()},
            hashes=dict(raw["hashes"]),
            probe=Probe(**raw["probe"]),
            evaluate=raw["evaluate"],
            published_at=raw["published_at"],
        )

    def write(self, folder: Path) -> None:
        """Write it into a publication's folder."""
        (folder / MANIFEST_FILE).write_text(self.to_json())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest of a publication.

        Raises:
            WeightsError: it is missing or no manifest.
        """
        try:
            return cls.parse((folder / MANIFEST_FILE).read_text())
        except UNREADABLE as error:
            raise WeightsError(f"{folder / MANIFEST_FILE} is no manifest: {error}") from error


def read_tensors(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes in a safetensors file, from its header alone.

    Raises:
        WeightsError: the file is missing, cut short or no safetensors file.
    """
    header, _ = _read_header(file)
    return {name: entry.info for name, entry in header.items()}


def model_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """All tensors of a Hugging Face model folder, one file or sharded."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{model_dir} has no .safetensors file")
    return {name: info for file in files for name, info in read_tensors(file).items()}


def published_tensors(model_dir: Path, dtype: str = "float32") -> dict[str, TensorInfo]:
    """What a publication of a model holds: its tensors in the run's dtype, a tied head left out.

    Args:
        model_dir: the initial model, whatever the dtype of its files.
        dtype: `model.dtype` of the run.

    Raises:
        WeightsError: the folder is no Hugging Face model.
    """
    try:
        is_tied = json.loads((model_dir / "config.json").read_text()).get("tie_word_embeddings")
    except (OSError, ValueError) as error:
        raise WeightsError(f"{model_dir}: config.json cannot be read: {error}") from error
    return {
        name: TensorInfo(PUBLISHED_DTYPES[dtype], info.shape)
        for name, info in model_tensors(model_dir).items()
        if not (is_tied and name == TIED_HEAD)
    }


def hash_tensors(file: Path) -> dict[str, str]:
    """The hash of each tensor's bytes in a safetensors file, several at a time."""
    header, start = _read_header(file)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):

        def hash_of(entry: _Entry) -> str:
            with view[start + entry.begin : start + entry.end] as part:
                return hash_bytes(part)

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return dict(zip(header, pool.map(hash_of, header.values()), strict=True))


def hash_bytes(data: bytes | memoryview) -> str:
    """The hash that manifests use."""
    return xxhash.xxh3_128_hexdigest(data)


def verify(folder: Path, expected: Mapping[str, TensorInfo]) -> Manifest:
    """Check a publication before an engine may see it.

    Args:
        folder: of the publication.
        expected: the model's tensors.

    Raises:
        WeightsError: a tensor is missing, unknown, of another shape or dtype, or damaged; or the
            manifest is of another version than the folder.
    """
    manifest = Manifest.read(folder)
    if manifest.version != folder.name:
        raise WeightsError(f"{folder}: its manifest is of version {manifest.version}")
    compare(f"{folder}: manifest", manifest.tensors, expected)
    compare(f"{folder}: {WEIGHTS_FILE}", read_tensors(folder / WEIGHTS_FILE), expected)
    damaged = [
        n for n, h in hash_tensors(folder / WEIGHTS_FILE).items() if manifest.hashes.get(n) != h
    ]
    if damaged:
        raise WeightsError(f"{folder}: {len(damaged)} tensors are damaged, first {damaged[0]}")
    return manifest


def compare(
    where: str, found: Mapping[str, TensorInfo], expected: Mapping[str, TensorInfo]
) -> None:
    """Compare the tensors that something has with those of the model.

    Raises:
        WeightsError: one is missing, unknown, or of another shape or dtype.
    """
    for name in expected.keys() - found.keys():
        raise WeightsError(
            f"{where} lacks {name} and {len(expected.keys() - found.keys()) - 1} more tensors"
        )
    for name in found.keys() - expected.keys():
        raise WeightsError(f"{where} has {name}, which the model does not have")
    for name, info in found.items():
        if info != expected[name]:
            raise WeightsError(f"{where} has {name} as {info}, the model has {expected[name]}")


def _read_header(file: Path) -> tuple[dict[str, _Entry], int]:
    """Tensor entries of a safetensors file, and where its data begins."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > size - 8:
                raise WeightsError(f"{file} is cut short: header of {length} bytes in {size}")
            raw = json.loads(opened.read(length))
        header = {name: _entry(entry) for name, entry in raw.items() if name != "__metadata__"}
    except UNREADABLE as error:
        raise WeightsError(f"{file} is no safetensors file: {error}") from error
    data_end = max((entry.end for entry in header.values()), default=0)
    if 8 + length + data_end > size:
        raise WeightsError(
            f"{file} is cut short: {size} bytes, its header promises {8 + length + data_end}"
        )
    return header, 8 + length


def _entry(raw: dict[str, Any]) -> _Entry:
    begin, end = raw["data_offsets"]
    if not (type(begin) is type(end) is int and 0 <= begin <= end):
        raise ValueError(f"data_offsets {begin!r}, {end!r}")
    return _Entry(TensorInfo(raw["dtype"], tuple(raw["shape"])), begin, end)
