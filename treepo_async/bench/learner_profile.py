"""Where the device's time goes in one forward and backward of a made tree: `python -m treepo_async.bench.learner_profile [key=value ...]`.

The keys are those of `bench.py learner` (`learner_cells`); the first cell is profiled, by tree packing, after two passes untimed. Kernels are put
under a kind by their names, and what no kernel covers is the device waiting for the host. Writes `profile-SHAPE.json` into `out`. Without CUDA the
operators of the CPU stand in for kernels, which shows that the command works and nothing else. Exit codes: 0, 2 wrong words.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from treepo_async.bench import machine
from treepo_async.bench.device_clock import timed
from treepo_async.bench.learner_cells import Way, parse
from treepo_async.bench.learner_run import build, jobs_of, one_rank
from treepo_async.errors import ConfigError
from treepo_async.learner.attention.plan import resolve

KINDS = (
    ("attention", ("flex_attention", "flash", "cascade", "sdpa", "triton_tem")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "xmma", "addmm", "aten::mm", "bmm")),
    ("copies", ("memcpy", "memset", "copy", "cat", "fill")),
    ("reductions", ("reduce", "softmax", "norm")),
    ("index", ("index", "gather", "scatter", "embedding")),
    ("elementwise", ("elementwise", "vectorized", "unrolled", "mul", "add", "silu")),
)
"""A kernel is of the first kind that has a part of its name."""
OTHER, WAITING = "other", "no kernel"
SHOWN = 15
EXIT_BAD_USE = 2


class Kernel(NamedTuple):
    """All calls of a kernel."""

    name: str
    seconds: float
    calls: int


def main(words: Sequence[str]) -> int:
    """Profile, say and write. Gives the exit code."""
    try:
        options = parse(words)
        cell = options.cells[0]
        cell = replace(cell, attention=resolve(cell.attention))
        with one_rank():
            learner = build(cell)
            share = jobs_of(cell, learner.shape)[Way.TREE].share
            for _ in range(2):
                learner.train(share)
            seconds: dict[str, float] = {}
            with profile(activities=_activities()) as found:
                timed(seconds, "wall", partial(learner.train, share))
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_BAD_USE
    kernels = _kernels(found)
    shares = by_kind(kernels, seconds["wall"])
    for name, taken in shares.items():
        sys.stdout.write(f"{name:16} {taken:8.4f} s  {taken / seconds['wall']:.0%}\n")
    for kernel in kernels[:SHOWN]:
        sys.stdout.write(f"{kernel.seconds:8.4f} s {kernel.calls:6} x {kernel.name[:120]}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    result = {
        "cell": str(cell),
        "wall_s": seconds["wall"],
        "by_kind": shares,
        "kernels": [kernel._asdict() for kernel in kernels[: 4 * SHOWN]],
        **machine.describe(),
    }
    (options.out / f"profile-{cell.shape}.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0


def by_kind(kernels: Iterable[Kernel], wall_s: float) -> dict[str, float]:
    """Seconds of each kind, most first, and what is left of the wall time, which is 0 where kernels overlap too much to tell."""
    found: dict[str, float] = {}
    for kernel in kernels:
        kind = kind_of(kernel.name)
        found[kind] = found.get(kind, 0.0) + kernel.seconds
    ordered = dict(sorted(found.items(), key=lambda item: -item[1]))
    return {**ordered, WAITING: max(0.0, wall_s - sum(found.values()))}


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    low = name.lower()
    return next((kind for kind, parts in KINDS if any(part in low for part in parts)), OTHER)


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU]


def _kernels(found: profile) -> list[Kernel]:
    """Of a profile, the longest first."""
    on_cuda = torch.cuda.is_available()
    kernels = [
        Kernel(
            row.key,
            (row.self_device_time_total if on_cuda else row.self_cpu_time_total) / 1e6,
            row.count,
        )
        for row in found.key_averages()
    ]
    return sorted(kernels, key=lambda kernel: -kernel.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
