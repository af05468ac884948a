"""The way of a version's weights, from the learner's device through a folder back to a device, a stage at a time.

`python -m treepo_async.bench.weight_path [key=value ...]`, keys: see `DEFAULTS`. The stages are the functions that a run publishes and checks by
(`learner.publish`, `weights.store`, `weights.manifest`); an engine is not needed: its part is played by `safetensors`, which maps the file
and copies to the device. Beside them, in the same round, plain copies of as many bytes, which no publication can beat. The tensors that come back must equal
those of the model bit for bit. Writes `weight_path-SHAPE.json`. Exit codes: 0, 1 they differ, 2 wrong words.

Needs torch, numpy, Megatron-Core, safetensors and xxhash. Neighbours: `learner_run` opens the groups, `device_clock` times.
"""

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from treepo_async.bench import machine
from treepo_async.bench.device_clock import place, timed
from treepo_async.bench.learner_run import one_rank
from treepo_async.bench.learner_shapes import find_shape
from treepo_async.bench.words import read_words
from treepo_async.errors import ConfigError
from treepo_async.learner.build import build_dummy
from treepo_async.learner.model.names import tensor_sizes
from treepo_async.learner.publish import PROBE_SEQUENCES, PROBE_TOKENS, named_tensors, publish
from treepo_async.learner.shape import ModelShape
from treepo_async.learner.step import Learner
from treepo_async.types import Int32, PolicyVersion
from treepo_async.weights.manifest import (
    PUBLISHED_DTYPES,
    WEIGHTS_FILE,
    TensorInfo,
    hash_bytes,
    verify,
)
from treepo_async.weights.store import NamedTensor, WeightStore
from treepo_async.weights.tensor_file import num_bytes as tensor_bytes

DEFAULTS = {
    "shape": "cpu",
    "dtype": "bfloat16",
    "rounds": "3",
    "folder": "/dev/shm",
    "out": "gpu_campaign",
}
Stages = dict[str, float]
"""Seconds by name, in the order in which they come."""
EXIT_FAILED, EXIT_BAD_USE = 1, 2


def main(words: Sequence[str]) -> int:
    """Measure, say and write. Gives the exit code."""
    try:
        options = parse(words)
        shape = find_shape(options["shape"])
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_USE
    with one_rank():
        found = measure(shape, options["dtype"], int(options["rounds"]), Path(options["folder"]))
    for line in lines(found):
        sys.stdout.write(line + "\n")
    out = Path(options["out"])
    out.mkdir(parents=True, exist_ok=True)
    result = {"shape": options["shape"], "dtype": options["dtype"], **found, **machine.describe()}
    (out / f"weight_path-{options['shape']}.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if found["passed"] else EXIT_FAILED


def parse(words: Sequence[str]) -> dict[str, str]:
    """The values of all keys.

    Raises:
        ConfigError: an unknown key or dtype, or a number of rounds that is none.
    """
    options = DEFAULTS | read_words(words, DEFAULTS)
    if options["dtype"] not in PUBLISHED_DTYPES:
        raise ConfigError(
            f"dtype={options['dtype']} is unknown; it is one of {', '.join(PUBLISHED_DTYPES)}"
        )
    if not (options["rounds"].isascii() and options["rounds"].isdigit() and int(options["rounds"])):
        raise ConfigError(f"rounds={options['rounds']} is not a whole number from 1, e.g. rounds=3")
    return options


def measure(shape: ModelShape, dtype: str, rounds: int, folder: Path) -> dict[str, Any]:
    """All rounds on one model, and whether every one brought back what the model has; needs opened process groups.

    Args:
        shape: of the model; its weights are random, and float32 masters stand behind bfloat16 ones, as in a run.
        dtype: of model and publication.
        rounds: at least one; the first is a warm-up where there are more.
        folder: publications come to lie in a new folder in it.
    """
    room = Path(tempfile.mkdtemp(prefix="weight_path-", dir=folder))
    try:
        learner = build_dummy(shape, dtype=getattr(torch, dtype))
        stages = [_round(learner, shape, dtype, room, number) for number in range(rounds)]
    finally:
        shutil.rmtree(room, ignore_errors=True)
    counted = [found for found, _ in stages[1:] or stages]
    return {
        "passed": all(same for _, same in stages),
        "bytes": num_bytes(shape, dtype),
        "rounds": len(counted),
        "stages": medians(counted),
    }


def num_bytes(shape: ModelShape, dtype: str) -> int:
    """Of a publication's tensors."""
    return sum(tensor_bytes(info) for info in expected_tensors(shape, dtype).values())


def expected_tensors(shape: ModelShape, dtype: str) -> dict[str, TensorInfo]:
    """What a publication must hold."""
    return {
        name: TensorInfo(PUBLISHED_DTYPES[dtype], size)
        for name, size in tensor_sizes(shape).items()
    }


def medians(rounds: Sequence[Mapping[str, float]]) -> Stages:
    """Of each stage over the rounds."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def lines(found: Mapping[str, Any]) -> list[str]:
    """A table in markdown: seconds of each stage, and how many bytes of the publication a second that is."""
    table = ["| stage | seconds | GB/s |", "|---|---|---|"]
    table += [
        f"| {name} | {seconds:.4f} | {found['bytes'] / seconds / 1e9:.2f} |"
        for name, seconds in found["stages"].items()
    ]
    verdict = "came back bit for bit" if found["passed"] else "CAME BACK DIFFERENT"
    return [*table, f"{found['bytes']:,} bytes {verdict}; medians of {found['rounds']} rounds"]


def _round(
    learner: Learner, shape: ModelShape, dtype: str, room: Path, number: int
) -> tuple[Stages, bool]:
    """One publication, checked and loaded, its stages by themselves, and plain copies."""
    kind, version = getattr(torch, dtype), PolicyVersion(0, number)
    (room / "config.json").write_text("{}")
    store = WeightStore(room / "publications", keep=1)
    whole: Stages = {}
    published = timed(
        whole,
        "publish",
        partial(
            publish,
            store,
            learner,
            version,
            _sequences(shape),
            dtype=kind,
            config_file=room / "config.json",
            evaluate=False,
        ),
    )
    timed(whole, "verify", partial(verify, published, expected_tensors(shape, dtype)))
    loaded = timed(whole, "to the device", partial(_load, published / WEIGHTS_FILE))
    whole = {"publish, verify, load": sum(whole.values()), **whole}
    # as masters are: exported tensors may be in another dtype than the publication
    same = all(_equal(loaded.pop(name), t.to(kind)) for name, t in learner.export()) and not loaded
    parts: Stages = {}
    timed(parts, "of publish: probe", partial(learner.score, _sequences(shape)))
    held = timed(
        parts,
        "of publish: export to host",
        lambda: list(named_tensors(learner.export(), kind)),
    )
    timed(parts, "of publish: hashes", partial(_hashed, held))
    del held
    timed(parts, "export, converted on the device", partial(_on_host, learner, kind))
    return {**whole, **parts, **_plain(learner.export(), kind, room / "plain")}, same


def _load(file: Path) -> dict[str, Tensor]:
    return {name: tensor.to(place()) for name, tensor in load_file(file).items()}


def _hashed(held: Iterable[NamedTensor]) -> list[str]:
    return [hash_bytes(tensor.data) for tensor in held]


def _on_host(learner: Learner, kind: torch.dtype) -> list[Tensor]:
    """Converted before they leave the device: of two dtypes the bytes of one travel."""
    return [tensor.to(kind).cpu() for _, tensor in learner.export()]


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return bool(torch.equal(found, wanted.to(found.device)))


def _sequences(shape: ModelShape) -> list[Int32]:
    """For a probe of the size of a run's."""
    rng = np.random.default_rng(0)
    size = (PROBE_SEQUENCES, min(PROBE_TOKENS, shape.max_position_embeddings))
    return list(rng.integers(0, shape.vocab_size, size, np.int32))


def _plain(tensors: Iterable[tuple[str, Tensor]], kind: torch.dtype, file: Path) -> Stages:
    """Copies of one flat tensor with the bytes of a publication: the least that its stages take."""
    found: Stages = {}
    flat = torch.cat([tensor.to(kind).flatten() for _, tensor in tensors]).view(torch.uint8)
    host = timed(found, "plain: device to host", flat.cpu)
    if flat.is_cuda:
        pinned = timed(found, "plain: pinning host memory", partial(_pinned, len(flat)))
        timed(found, "plain: device to pinned host", partial(pinned.copy_, flat))
        timed(found, "plain: pinned host to device", partial(flat.copy_, pinned))
        del pinned
    timed(found, "plain: host to file", partial(host.numpy().tofile, file))
    read = timed(found, "plain: file to host", _reader(file))
    timed(found, "plain: host to device", partial(flat.copy_, torch.from_numpy(read)))
    file.unlink()
    steps = ("device to host", "host to file", "file to host", "host to device")
    return {**found, "plain: all four": sum(found[f"plain: {step}"] for step in steps)}


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _reader(file: Path) -> Callable[[], Any]:
    return lambda: np.fromfile(file, np.uint8)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
