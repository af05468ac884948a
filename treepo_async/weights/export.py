"""A checkpoint's weights as a Hugging Face folder, without torch: what transformers and SGLang open.

The folder has the initial model's config, tokenizer and generation config beside the tensors, in one file or in several with an
index. Neighbours: `checkpoints` has the tensors in float32 under Hugging Face's names, `tensor_file` writes.

Invariant: the folder appears by one rename, once all of it is on disk; one tensor is in memory at a time.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from treepo_async.config.wiring import POLICY_FILE
from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.checkpoints import WEIGHTS_KIND, Checkpoint, file_of
from treepo_async.weights.durable import make_folder, publish_folder
from treepo_async.weights.manifest import WEIGHTS_FILE, TensorInfo, read_tensors
from treepo_async.weights.tensor_file import TensorFileWriter, header_room, num_bytes

SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in a file, unless one tensor alone has more; what transformers takes by default."""
BLOCK_ELEMENTS = 2**22
"""Elements of a tensor that are converted and written at once."""
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
"""What can be exported, and how safetensors spells it."""
COPIED = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files of the initial model, tokenizer and all, that belong to the trained one too."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    version: PolicyVersion
    dtype: str
    num_files: int
    num_bytes: int
    """Of the tensors."""


def export(
    checkpoint: Checkpoint,
    model_dir: Path,
    folder: Path,
    *,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write the weights of a checkpoint that is whole.

    Args:
        checkpoint: read, its weights verified.
        model_dir: of the initial model, whose config.json and tokenizer the folder gets.
        folder: not there yet.
        dtype: one of `DTYPES`.
        shard_bytes: most bytes of tensors in a file.

    Raises:
        WeightsError: the folder is there, or the checkpoint's tensors are not float32.
        OSError: something cannot be read or written; nothing is left at `folder`.
    """
    if folder.exists():
        raise WeightsError(f"{folder} is there already and never overwritten; name another folder")
    source = checkpoint.folder / file_of(WEIGHTS_KIND)
    tensors = _converted(source, dtype)
    shards = _shards(tensors, shard_bytes)

    def fill(temporary: Path) -> None:
        copy_companions(model_dir, temporary, dtype=dtype)
        (temporary / POLICY_FILE).write_text(f"{checkpoint.state.version}\n")
        for name, shard in shards.items():
            _write_shard(source, temporary / name, shard)
        if len(shards) > 1:
            _write_index(temporary / INDEX_FILE, shards)

    write_folder(folder, fill)
    total = sum(num_bytes(info) for info in tensors.values())
    return Exported(folder, checkpoint.state.policy_version, dtype, len(shards), total)


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Have a flat folder appear by one rename, once everything in it is on disk.

    Args:
        folder: not there yet, or empty; folders above it are made.
        fill: writes files into the folder it is given.

    Raises:
        OSError: something cannot be written; nothing is left, of this write or of one that was killed.
    """
    make_folder(folder.absolute().parent)
    temporary = folder.with_name(f".{folder.name}.export")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        fill(temporary)
        publish_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of bfloat16, rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | np.uint32(0x0040)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)


def _converted(source: Path, dtype: str) -> dict[str, TensorInfo]:
    """What the tensors of a checkpoint will look like."""
    found = read_tensors(source)
    for name, info in found.items():
        if info.dtype != "F32":
            raise WeightsError(f"{source}: {name} is {info.dtype}, a checkpoint has F32")
    return {name: TensorInfo(DTYPES[dtype], info.shape) for name, info in found.items()}


def _shards(
    tensors: Mapping[str, TensorInfo], shard_bytes: int
) -> dict[str, dict[str, TensorInfo]]:
    """The tensors in their order, by the file that gets them."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + num_bytes(info) > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += num_bytes(info)
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    return {
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": shard
        for i, shard in enumerate(shards, start=1)
    }


def _write_shard(source: Path, file: Path, shard: Mapping[str, TensorInfo]) -> None:
    with (
        safe_open(source, "np") as tensors,
        TensorFileWriter(file, room=header_room(shard)) as writer,
    ):
        for name, info in shard.items():
            writer.add(name, info, _blocks(tensors.get_tensor(name), info.dtype))


def _blocks(tensor: NDArray[np.float32], dtype: str) -> Iterator[bytes]:
    flat = np.ascontiguousarray(tensor).reshape(-1)
    for begin in range(0, len(flat), BLOCK_ELEMENTS):
        block = flat[begin : begin + BLOCK_ELEMENTS]
        yield (to_bfloat16(block) if dtype == "BF16" else block).tobytes()


def _write_index(file: Path, shards: Mapping[str, Mapping[str, TensorInfo]]) -> None:
    total = sum(num_bytes(info) for shard in shards.values() for info in shard.values())
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors},
    }
    file.write_text(json.dumps(index, indent=2) + "\n")


def copy_companions(model_dir: Path, folder: Path, *, dtype: str) -> None:
    """Copy everything of a model but its weights; the copied config names the dtype of those that stand beside it.

    Args:
        model_dir: of the model.
        folder: to copy to.
        dtype: as config.json spells it, e.g. `bfloat16`.

    Raises:
        OSError: config.json is missing, or something cannot be read or written.
    """
    for pattern in COPIED:
        for file in model_dir.glob(pattern):
            if not file.name.endswith(".safetensors.index.json"):
                shutil.copyfile(file, folder / file.name)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
