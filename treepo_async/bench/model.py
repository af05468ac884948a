"""A random Qwen2 of any size on disk, with the tiny tokenizer: speed does not depend on what the weights say.

Float32, a fixed seed, and about the proportions of Qwen2.5-7B: an MLP 5.3 times as wide as the hidden size, one KV head for
8 query heads (there 7). So a token costs what it costs there in proportion: mostly matrices, a little attention. Imports torch only to write a model.
"""

import hashlib
import json
import secrets
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from treepo_async.bench.cells import Stop
from treepo_async.tiny.recipe import Architecture
from treepo_async.tiny.tokenizer import build_tokenizer, save_tokenizer

SEED = 0
MAX_CONTEXT = 16384
HIDDEN_STEP = 64
"""Hidden sizes are multiples of this."""

_FORMAT_VERSION = 1
_HEAD_DIM = 64
_MIN_HEADS = 4
_QUERIES_PER_KV_HEAD = 8
_MLP_RATIO = 43 / 8
_FLOAT_BYTES = 4


def architecture_of(layers: int, hidden: int) -> Architecture:
    """At least four heads, of 64 dimensions if there is room for so many."""
    num_heads = hidden // min(_HEAD_DIM, hidden // _MIN_HEADS)
    return Architecture(
        hidden_size=hidden,
        intermediate_size=int(_MLP_RATIO * hidden),
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=max(1, num_heads // _QUERIES_PER_KV_HEAD),
        max_position_embeddings=MAX_CONTEXT,
    )


def cache_bytes_per_token(layers: int, hidden: int) -> int:
    """Size of an entry of the KV cache: keys and values of every layer."""
    architecture = architecture_of(layers, hidden)
    head_dim = hidden // architecture.num_heads
    return 2 * layers * architecture.num_kv_heads * head_dim * _FLOAT_BYTES


def prepare(cache_dir: Path, layers: int, hidden: int, stop: Stop) -> Path:
    """The model's folder, written first if it is not there yet.

    Args:
        cache_dir: created if missing; several processes may share it.
        layers: of the decoder.
        hidden: its size, a multiple of `HIDDEN_STEP`.
        stop: without one the model names no end-of-sequence token, so that the engine ends nothing by itself.
    """
    architecture = architecture_of(layers, hidden)
    folder = cache_dir / f"random-{layers}x{hidden}-{stop}-{_content_hash(architecture)}"
    if folder.exists():
        return folder
    building = cache_dir / f".{folder.name}.{secrets.token_hex(8)}"
    building.mkdir(parents=True)
    try:
        _write(building, architecture, stop)
        # another process may have been faster, with the same content
        with suppress(OSError):
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _content_hash(architecture: Architecture) -> str:
    content = [_FORMAT_VERSION, SEED, asdict(architecture), build_tokenizer().to_str()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, architecture: Architecture, stop: Stop) -> None:
    from treepo_async.tiny.model import TinyQwen2, save_model

    save_model(TinyQwen2(architecture, SEED), architecture, folder)
    save_tokenizer(folder, architecture.max_position_embeddings)
    if stop is Stop.NONE:
        for name in ("config.json", "generation_config.json"):
            path = folder / name
            config = json.loads(path.read_text()) | {"eos_token_id": None}
            path.write_text(json.dumps(config, indent=2) + "\n")
