"""The sweep: trees and independent sampling in turn on one engine, cell by cell, pair by pair.

Which arm goes first alternates, and every measurement has a cache namespace of its own in an empty cache, so that
neither the order nor an earlier measurement favours one. Pairs found in `samples.csv` are not repeated. Waits: as
`engine` and `measure` do.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from treepo_async.bench import machine, plot, report, samples
from treepo_async.bench.cells import Arm, Cell
from treepo_async.bench.command import SamplingOptions
from treepo_async.bench.engine import BenchEngine, EngineModel, EngineSize, started
from treepo_async.bench.learner_shapes import find_shape
from treepo_async.bench.measure import measure
from treepo_async.bench.model import cache_bytes_per_token, prepare
from treepo_async.bench.published import (
    DTYPE,
    LOAD_FORMAT,
    prepare_published,
    published_cache_bytes,
)
from treepo_async.bench.samples import Sample
from treepo_async.bench.summary import cells_of, pairs_of, summarize
from treepo_async.config.limits import SPARE_TOKENS
from treepo_async.cpu.environment import cuda_present
from treepo_async.data.tokenizer import TextTokenizer
from treepo_async.errors import ConfigError

_WARM_UP: Mapping[str, Any] = {"depth": 2, "segment": 4, "width": 4, "branch": 2, "prompt": 16}
"""A cell that does not count: what the engine does once, at its first requests, is of no arm."""


async def compare(options: SamplingOptions, cache_dir: Path, say: Callable[[str], None]) -> None:
    """Measure what is missing, and write everything anew after each cell.

    Raises:
        ConfigError: see `size_of`.
        EngineError, DeadlineError, TreeError: from a measurement; the pairs before it are kept.
        DataError: `samples.csv` holds something else.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    machine.note(options.out / "environment.json")
    missing = missing_pairs(options)
    if missing:
        cell = options.cells[0]
        model_dir, model = await asyncio.to_thread(_prepared, cache_dir, cell)
        tokenizer, small = TextTokenizer.load(model_dir), replace(cell, **_WARM_UP)
        async with started(model_dir, size_of([small, *missing]), model) as engine:
            await measure_pair(small, 1, engine, tokenizer)
            await _measure_all(options.out, missing, engine, tokenizer, say)
    write(options.out)
    say(f"table, plot and samples: {options.out}")


def write(out: Path) -> None:
    """Write `cells.csv`, `table.md` and `plot.png` from `samples.csv`."""
    found = samples.read(out / "samples.csv")
    summaries = [summarize(pairs_of(found, cell)) for cell in cells_of(found)]
    report.write_cells(out / "cells.csv", summaries)
    report.write_table(out / "table.md", summaries)
    plot.draw(out / "plot.png", summaries)


def missing_pairs(options: SamplingOptions) -> dict[Cell, list[int]]:
    """Numbers of the pairs to measure, for each cell that lacks some."""
    found = samples.read(options.out / "samples.csv")
    missing = {}
    for cell in options.cells:
        there = {tree.pair for tree, _ in pairs_of(found, cell)}
        pairs = [pair for pair in range(1, options.pairs + 1) if pair not in there]
        if pairs:
            missing[cell] = pairs
    return missing


def size_of(cells: Sequence[Cell]) -> EngineSize:
    """An engine that holds every cell; of a published size on a GPU, one that holds what fits, as in training.

    Raises:
        ConfigError: its cache would not fit into this machine's free memory.
    """
    largest = max(cells, key=lambda cell: cell.cache_tokens)
    fits = largest.shape and cuda_present()
    needed = largest.cache_tokens * _cache_bytes(largest)
    free = psutil.virtual_memory().available
    if needed > free and not fits:
        raise ConfigError(
            f"{largest}: all responses of its prompts={largest.prompts} take {needed / 2**30:.1f} GiB of cache, "
            f"{free / 2**30:.1f} GiB are free; take fewer prompts, or less of depth, segment or width"
        )
    return EngineSize(
        context_tokens=max(cell.context for cell in cells) + SPARE_TOKENS,
        cache_tokens=None if fits else largest.cache_tokens,
        running_requests=cells[0].running,
    )


def _prepared(cache_dir: Path, cell: Cell) -> tuple[Path, EngineModel]:
    if not cell.shape:
        return prepare(cache_dir, cell.layers, cell.hidden, cell.stop), EngineModel()
    vocab_size = find_shape(cell.shape).vocab_size
    folder = prepare_published(cache_dir, cell.shape, cell.stop)
    return folder, EngineModel(DTYPE, vocab_size, LOAD_FORMAT)


def _cache_bytes(cell: Cell) -> int:
    """Of one token."""
    if cell.shape:
        return published_cache_bytes(cell.shape)
    return cache_bytes_per_token(cell.layers, cell.hidden)


async def measure_pair(
    cell: Cell, pair: int, engine: BenchEngine, tokenizer: TextTokenizer
) -> dict[Arm, Sample]:
    """Both arms, the tree first in every other pair."""
    arms = (Arm.TREE, Arm.INDEPENDENT) if pair % 2 else (Arm.INDEPENDENT, Arm.TREE)
    found = {}
    for place, arm in enumerate(arms, start=1):
        await engine.flush()
        found[arm] = await measure(cell, arm, engine.client(), tokenizer, pair=pair, place=place)
    return found


async def _measure_all(
    out: Path,
    missing: dict[Cell, list[int]],
    engine: BenchEngine,
    tokenizer: TextTokenizer,
    say: Callable[[str], None],
) -> None:
    file = out / "samples.csv"
    say(report.setup(next(iter(missing))))
    for cell, pairs in missing.items():
        say(str(cell))
        for pair in pairs:
            found = await measure_pair(cell, pair, engine, tokenizer)
            samples.append(file, found.values())
            say(report.pair_line(found[Arm.TREE], found[Arm.INDEPENDENT]))
        say(report.cell_line(summarize(pairs_of(samples.read(file), cell))))
        write(out)
