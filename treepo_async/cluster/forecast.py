"""The sizes of a run before it starts, and the device that they are for.

Neighbours: `memory` counts, `forecast_text` and `forecast_warnings` put it into words. Nothing here looks at weights, GPUs or the network.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treepo_async.cluster.memory import (
    GIB,
    EngineMemory,
    RankMemory,
    Work,
)
from treepo_async.cluster.plan import sizes
from treepo_async.config.layout import Layout
from treepo_async.config.limits import context_length, prompt_limit, response_limit
from treepo_async.config.schema import Config
from treepo_async.errors import ConfigError
from treepo_async.learner.shape import ModelShape, check_split

DEFAULT_GPU_GIB = 80.0
RANK_GIB, ENGINE_GIB, OTHER_GIB, REST_GIB = 0.4, 1.0, 0.05, 0.7
"""On CPU, of a process beside its tensors: a learner's rank, SGLang with its children, an actor or replay; and of driver and Ray.
Measured on Linux with torch 2.13, SGLang 0.5.23 and Ray 2.60."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a run is meant to go."""

    gpu_bytes: int | None
    """Memory of each GPU; None: processes of this machine, on CPU."""
    ram_bytes: int
    """Of this machine."""


def choose_device(gpu_gib: float | None, *, has_cuda: bool, needed: int, ram_bytes: int) -> Device:
    """What to estimate for: GPUs where one asked for them, has some, or could not run without.

    Args:
        gpu_gib: memory of a GPU as asked for; None: not asked for.
        has_cuda: whether this machine has a GPU.
        needed: bytes of all processes together on CPU.
        ram_bytes: memory of this machine.
    """
    if gpu_gib is None and not has_cuda and needed <= ram_bytes:
        return Device(None, ram_bytes)
    return Device(int((gpu_gib or DEFAULT_GPU_GIB) * GIB), ram_bytes)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Sizes of a run, read from its config and the model's config.json."""

    config: Config
    model: Mapping[str, Any]
    shape: ModelShape
    layout: Layout

    @classmethod
    def of(cls, config: Config, model: Mapping[str, Any]) -> "Forecast":
        """Read, and refuse what cannot work.

        Raises:
            ConfigError: the model is not supported, does not split over the layout, or cannot hold the lengths.
        """
        shape, layout = ModelShape.from_config(model), Layout.parse(config.learner.layout)
        check_split(shape, tp=layout.tp, pp=layout.pp)
        context_length(config, model)
        return cls(config, model, shape, layout)

    @property
    def longest_path(self) -> int | None:
        """Tokens of the longest prompt with the longest response; None: trees of a file are as long as they are."""
        if self.config.data.trees is not None:
            return None
        return prompt_limit(self.config, self.model) + response_limit(self.config)

    def needed_on_cpu(self) -> int:
        """Bytes of all processes together."""
        return sum(number for _, number in self.processes())

    def processes(self) -> Iterator[tuple[str, int]]:
        """Every kind of process on CPU, and the bytes of all of its processes."""
        config = self.config
        num_engines, num_actors = sizes(config)
        ranks = self.ranks(on_gpu=False)
        per_stage = self.layout.world_size // self.layout.pp
        yield "ranks", sum(per_stage * (rank.total + int(RANK_GIB * GIB)) for rank in ranks)
        engine = self.engine(0)
        pool = config.engine.max_total_tokens or 0
        one = engine.weights + pool * engine.kv_bytes_per_token + int(ENGINE_GIB * GIB)
        yield "engines", num_engines * one
        yield "others", int((num_actors + 1) * OTHER_GIB * GIB + REST_GIB * GIB)

    def ranks(self, *, on_gpu: bool) -> list[RankMemory]:
        """A rank of each pipeline stage."""
        learner = self.config.learner
        work = Work(
            layout=self.layout,
            dtype=self.config.model.dtype,
            tokens=max(learner.microbatch_tokens, self.longest_path or 0),
            recompute=learner.recompute,
            head_tokens=learner.head_tokens,
            sequence_parallel=learner.sequence_parallel,
            dense_mask=learner.attention == "dense",
            on_gpu=on_gpu,
            entropy_gradient=learner.entropy_coef > 0,
            with_reference=learner.kl_coef > 0,
        )
        return [RankMemory.of(self.shape, work, stage) for stage in range(self.layout.pp)]

    def engine(self, device_bytes: int) -> EngineMemory:
        """One engine."""
        return EngineMemory.of(
            self.shape,
            dtype=self.config.model.dtype,
            prefill_chunk_tokens=self.config.engine.prefill_chunk_tokens,
            device_bytes=device_bytes,
            tp=self.config.engine.tp,
        )


def parse_gpu_gib(text: str) -> float:
    """Read the value of `--gpu-gib`.

    Raises:
        ConfigError: it is no number above 0.
    """
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise ConfigError(f"--gpu-gib={text} is no memory of a GPU in GiB, e.g. --gpu-gib=80")
    return found


def ram_bytes() -> int:
    """Memory of this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo names no MemTotal")
