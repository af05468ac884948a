"""What a dry run says beside the plan: what a step is made of, what it needs of memory, and what a person should think over.

Neighbours: `memory` counts, `plan` says which roles there are, `launch/run.py` prints. Nothing here looks at weights, GPUs or the network.
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
    model_parameters,
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
ROOMY = 4
"""Longest paths in a microbatch below which trees are cut, and what their pieces share is computed again."""
COLUMNS = ("weights", "gradients", "optimizer", "reference", "activations", "working", "total")


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
    def longest_path(self) -> int:
        """Tokens of the longest prompt with the longest response."""
        return prompt_limit(self.config, self.model) + response_limit(self.config)

    def needed_on_cpu(self) -> int:
        """Bytes of all processes together."""
        return sum(number for _, number in _processes(self))

    def describe(self, device: Device) -> str:
        """The text of a dry run, warnings last."""
        rows = [
            *_step(self),
            *_memory(self, device),
            *(("warning", text) for text in self.warnings(device)),
        ]
        return "\n".join(f"  {name:<8} {text}" for name, text in rows)

    def warnings(self, device: Device) -> list[str]:
        """What will probably go wrong or be slow."""
        return [*_memory_warnings(self, device), *_packing_warnings(self)]

    def ranks(self, *, on_gpu: bool) -> list[RankMemory]:
        """A rank of each pipeline stage."""
        learner = self.config.learner
        work = Work(
            layout=self.layout,
            dtype=self.config.model.dtype,
            tokens=max(learner.microbatch_tokens, self.longest_path),
            recompute=learner.recompute,
            head_tokens=learner.head_tokens,
            sequence_parallel=learner.sequence_parallel,
            dense_mask=learner.attention == "dense",
            fused_norm=on_gpu,
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


def _step(forecast: Forecast) -> Iterator[tuple[str, str]]:
    config, replay, learner = forecast.config, forecast.config.replay, forecast.config.learner
    prompts, width = replay.prompts_per_batch, config.tree.width
    updates = learner.minibatches
    yield (
        "update",
        f"{_count(updates, 'update')} a step of {prompts / updates:g} trees, dealt to "
        f"{_count(forecast.layout.dp, 'replica')}; loss {learner.loss}, {learner.normalizer}, mask {learner.mask}, "
        f"correction {learner.correction}",
    )
    response, prompt = response_limit(config), prompt_limit(config, forecast.model)
    most = prompts * (prompt + width * response)
    yield (
        "lengths",
        f"prompts up to {prompt} tokens, responses up to {response}, paths up to {forecast.longest_path}; "
        f"a step at most {most:,} tokens",
    )
    ratio = learner.microbatch_tokens / forecast.longest_path
    yield (
        "packing",
        f"{learner.microbatch_tokens} tokens a microbatch = {ratio:.1f} longest paths, recompute {learner.recompute}, "
        f"logits of {learner.head_tokens} tokens at once",
    )
    if config.data.trees is None:
        ahead = (replay.max_staleness + 1) * prompts
        at_once = config.actors * config.actor.concurrent_trees
        yield (
            "ahead",
            f"at most {ahead} trees begun and not trained = (staleness {replay.max_staleness} + 1) x {prompts}; "
            f"actors grow {at_once} at once",
        )


def _memory(forecast: Forecast, device: Device) -> Iterator[tuple[str, str]]:
    shape, config = forecast.shape, forecast.config
    num_engines, _ = sizes(config)
    on_gpu = device.gpu_bytes is not None
    where = "CPU" if device.gpu_bytes is None else f"GPUs of {device.gpu_bytes / GIB:g} GiB"
    yield (
        "memory",
        f"estimate in GiB for {where}: {_short(model_parameters(shape))} parameters, {config.model.dtype}",
    )
    ranks = forecast.ranks(on_gpu=on_gpu)
    yield "", f"{'a rank of stage':<16}" + "".join(f"{column:>12}" for column in COLUMNS)
    for rank in ranks:
        cells = "".join(f"{getattr(rank, column) / GIB:12.2f}" for column in COLUMNS)
        yield "", f"{_stage_name(rank.stage, len(ranks)):<16}{cells}"
    if num_engines:
        yield "", _engine_text(forecast, device)
    if device.gpu_bytes is None:
        parts = ", ".join(f"{name} {number / GIB:.1f}" for name, number in _processes(forecast))
        total = forecast.needed_on_cpu() / GIB
        yield "", f"all processes {total:.1f} of {device.ram_bytes / GIB:.1f}: {parts}"
    else:
        number = forecast.layout.world_size
        yield "", f"{number + num_engines} GPUs: {number} for ranks, {num_engines} for engines"


def _engine_text(forecast: Forecast, device: Device) -> str:
    engine = forecast.engine(device.gpu_bytes or device.ram_bytes)
    pool, context = (
        forecast.config.engine.max_total_tokens,
        context_length(forecast.config, forecast.model),
    )
    text = f"an engine: weights {engine.weights / GIB:.2f}, KV cache {engine.kv_bytes_per_token / 1024:g} KiB a token"
    if device.gpu_bytes is not None:
        fit = max(0, engine.tokens_that_fit(device.gpu_bytes))
        text += (
            f"; beside {engine.reserved / GIB:.1f} for SGLang {fit:,} tokens fit = {fit // context:,} contexts of "
            f"{context}"
        )
    if pool is not None:
        text += f"; asked for {pool:,} tokens = {pool * engine.kv_bytes_per_token / GIB:.2f}, {pool // context} contexts of {context}"
    return text


def _processes(forecast: Forecast) -> Iterator[tuple[str, int]]:
    """Every kind of process on CPU, and the bytes of all of its processes."""
    config = forecast.config
    num_engines, num_actors = sizes(config)
    ranks = forecast.ranks(on_gpu=False)
    per_stage = forecast.layout.world_size // forecast.layout.pp
    yield "ranks", sum(per_stage * (rank.total + int(RANK_GIB * GIB)) for rank in ranks)
    engine = forecast.engine(0)
    pool = config.engine.max_total_tokens or 0
    one = engine.weights + pool * engine.kv_bytes_per_token + int(ENGINE_GIB * GIB)
    yield "engines", num_engines * one
    yield "others", int((num_actors + 1) * OTHER_GIB * GIB + REST_GIB * GIB)


def _memory_warnings(forecast: Forecast, device: Device) -> Iterator[str]:
    if device.gpu_bytes is None:
        needed = forecast.needed_on_cpu()
        if needed > device.ram_bytes:
            yield (
                f"all processes need about {needed / GIB:.1f} GiB, this machine has {device.ram_bytes / GIB:.1f}"
            )
        return
    worst = max(forecast.ranks(on_gpu=True), key=lambda rank: rank.total)
    if worst.total > device.gpu_bytes:
        largest = max(COLUMNS[:-1], key=lambda column: int(getattr(worst, column)))
        yield (
            f"a rank of stage {worst.stage} needs about {worst.total / GIB:.1f} GiB, a GPU has "
            f"{device.gpu_bytes / GIB:g}; most of it is for {largest}: {_way_out(largest)}"
        )
    if sizes(forecast.config)[0]:
        yield from _engine_warnings(forecast, device.gpu_bytes)


def _engine_warnings(forecast: Forecast, gpu_bytes: int) -> Iterator[str]:
    config = forecast.config
    engine, context = forecast.engine(gpu_bytes), context_length(config, forecast.model)
    wanted = config.engine.max_total_tokens or context
    fit = engine.tokens_that_fit(gpu_bytes)
    if fit < wanted:
        what = (
            "one context" if config.engine.max_total_tokens is None else "engine.max_total_tokens"
        )
        yield (
            f"an engine has room for {max(0, fit):,} tokens of KV cache on a GPU of {gpu_bytes / GIB:g} GiB, {what} is "
            f"{wanted:,}; take a larger GPU or a smaller model"
        )


def _packing_warnings(forecast: Forecast) -> Iterator[str]:
    budget, longest = forecast.config.learner.microbatch_tokens, forecast.longest_path
    if budget < longest:
        yield (
            f"learner.microbatch_tokens={budget} is less than one path of {longest} tokens, which then makes a microbatch of "
            f"its own; memory is estimated for {longest}"
        )
    if budget < ROOMY * longest and forecast.config.learner.packing != "flat":
        yield (
            f"learner.microbatch_tokens={budget} is less than {ROOMY} x {longest}, the longest path: trees are cut into more "
            "pieces, and what the pieces share is computed in each"
        )


def _way_out(column: str) -> str:
    if column in ("activations", "working"):
        return "lower learner.microbatch_tokens, or give learner.recompute=full, or a larger tp"
    return "give learner.layout a larger tp or pp"


def _stage_name(stage: int, num_stages: int) -> str:
    ends = [
        *(["embedding"] if stage == 0 else []),
        *(["head"] if stage == num_stages - 1 else []),
    ]
    return f"{stage}" + (f" ({', '.join(ends)})" if ends else "")


def _short(number: int) -> str:
    """A number with three or four digits, e.g. 7.616B."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return str(number)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ram_bytes() -> int:
    """Memory of this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo names no MemTotal")
