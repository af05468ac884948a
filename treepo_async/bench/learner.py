"""Tree-packed against flat and padded training of the same trees: `bench.py learner`.

Sweeps over cells, appends what was measured to `samples.csv`, and writes `cells.csv`, `table.md` and `environment.json`. Rounds that this code
measured before on this kind of device are not repeated; others count for nothing. Needs torch, numpy and Megatron-Core, and for trees
from a file what reads them. Neighbours: `learner_run` measures, `learner_report` writes.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from treepo_async.bench import learner_report as report
from treepo_async.bench import learner_samples as samples
from treepo_async.bench import machine
from treepo_async.bench.learner_cells import LearnerCell, LearnerOptions
from treepo_async.bench.learner_run import build, jobs_of, measure, one_rank, warm_up
from treepo_async.bench.learner_samples import Origin
from treepo_async.learner.attention.plan import resolve
from treepo_async.learner.step import Learner


def compare(options: LearnerOptions, say: Callable[[str], None]) -> None:
    """Measure what is missing, and write.

    Args:
        options: from `learner_cells.parse`.
        say: prints a line.

    Raises:
        ConfigError: the model or the attention is unknown here, or the file of trees is not one.
        DataError: `samples.csv` or the file of trees is damaged.
        DifferentGradientError: tree and flat packing do not agree.
    """
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    cells = [replace(cell, attention=resolve(cell.attention)) for cell in options.cells]
    origin = Origin(machine.code_digest(), _device())
    found = samples.read(out / "samples.csv")
    done = origin.of(found)
    if len(done) < len(found):
        say(f"not counted, of other code or another device: {len(found) - len(done)} samples")
    missing = [
        (cell, numbers)
        for cell in cells
        if (numbers := range(len(samples.rounds_of(done, cell)) + 1, options.rounds + 1))
    ]
    if missing:
        machine.note(
            out / "environment.json",
            device=origin.device,
            torch_threads=torch.get_num_threads(),
        )
        with one_rank():
            # a cell needs the learner of the one before it: only trees are swept
            for name, group in groupby(missing, key=lambda item: report.setup(item[0])):
                chosen = list(group)
                say(f"{name} on {origin.device}")
                learner = build(chosen[0][0])
                for cell, numbers in chosen:
                    _measure_cell(learner, cell, numbers, origin, out, say)
    write(out, origin)


def write(out: Path, origin: Origin) -> None:
    """Write `cells.csv` and `table.md` from what `samples.csv` has of an origin."""
    summaries = report.cells_of(origin.of(samples.read(out / "samples.csv")))
    report.write_cells(out / "cells.csv", summaries)
    report.write_table(out / "table.md", summaries)


def _measure_cell(
    learner: Learner,
    cell: LearnerCell,
    numbers: range,
    origin: Origin,
    out: Path,
    say: Callable[[str], None],
) -> None:
    say(str(cell))
    jobs = jobs_of(cell, learner.shape)
    warmed = warm_up(learner, jobs, cell.dtype)
    for number in numbers:
        found = measure(learner, cell, jobs, warmed, number, origin)
        samples.append(out / "samples.csv", found)
        say(report.round_line({sample.way: sample for sample in found}))
    done = origin.of(samples.read(out / "samples.csv"))
    (summary,) = (s for s in report.cells_of(done) if s.cell == cell)
    say(report.cell_line(summary))
    write(out, origin)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
