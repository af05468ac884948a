"""`bench.py async`: every arm with every seed, a cell at a time, and everything written anew after each.

A cell that is in `cells/` is not measured again, so a comparison that was stopped goes on where it was. Waits: as the back
end does.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from treepo_async.bench import (
    async_plot,
    async_real,
    async_report,
    async_scripted,
    machine,
    sim_arms,
)
from treepo_async.bench.async_arms import settings_of
from treepo_async.bench.async_cells import AsyncOptions
from treepo_async.bench.async_rows import Arm, CellData, read_cell, write_cell, write_rows
from treepo_async.bench.async_script import Script
from treepo_async.bench.async_service import Service
from treepo_async.bench.async_summary import summarize
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import ConfigError

PREFILL_SPEED = 100.0
"""Tokens of a context that a scripted engine computes in the time of one decoded token."""

Measure = Callable[[Arm, int, Path], CellData]
"""Measures an arm with a seed; what it needs lies in the folder."""


def compare(options: AsyncOptions, say: Callable[[str], None]) -> None:
    """Measure what is missing, and write tables and plots.

    Raises:
        ConfigError: `out` holds cells of another set-up.
        TreepoError: a cell failed; those before it are kept.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    _check_same(options)
    machine.note(options.out / "environment.json")
    missing = [cell for cell in options.cells() if not _folder(options, *cell).exists()]
    if missing:
        measure = _measure_of(options)
        for number, (arm, seed) in enumerate(missing, start=1):
            folder = _folder(options, arm, seed)
            data = measure(arm, seed, options.out / "work" / folder.name)
            write_cell(folder, data)
            (summary,) = summarize([data])
            say(f"[{number}/{len(missing)}] {async_report.cell_line(summary)}")
            write(options.out)
    write(options.out)
    say((options.out / "table.md").read_text())


def write(out: Path) -> None:
    """Write `steps.csv`, `ledger.csv`, `evals.csv`, `cells.csv`, `table.md` and `plot.png` from the cells."""
    folders = sorted(folder for folder in (out / "cells").iterdir() if folder.suffix != ".rough")
    cells = [read_cell(folder) for folder in folders]
    summaries = summarize(cells)
    write_rows(out, cells)
    async_report.write_cells(out / "cells.csv", summaries)
    (out / "table.md").write_text(async_report.text(cells, summaries))
    async_plot.draw(out / "plot.png", cells, summaries)


def _folder(options: AsyncOptions, arm: Arm, seed: int) -> Path:
    return options.out / "cells" / f"{arm}-seed{seed}"


def _check_same(options: AsyncOptions) -> None:
    """Cells are compared with each other, so all must have been asked for alike."""
    asked = {
        name: value
        for name, value in asdict(options).items()
        if name not in ("arms", "seeds", "out")
    }
    text = json.dumps(asked, indent=1, default=str)
    file = options.out / "options.json"
    if file.exists() and file.read_text() != text:
        raise ConfigError(
            f"out={options.out} holds cells that were measured with other keys ({file}); take another out="
        )
    file.write_text(text)


def _measure_of(options: AsyncOptions) -> Measure:
    match options.backend:
        case "scripted":
            return _scripted(options)
        case "real":
            return _real(options)
        case "sim":
            return lambda arm, seed, _: sim_arms.measure(options, arm, seed)
    raise ConfigError(f"backend={options.backend} cannot be measured here")


def _real(options: AsyncOptions) -> Measure:
    def measure(arm: Arm, seed: int, folder: Path) -> CellData:
        return async_real.run_cell(
            arm,
            real_words(options, arm, seed, folder),
            folder,
            seed=seed,
            warm_up=options.warm_up,
            last=options.steps,
        )

    return measure


def real_words(options: AsyncOptions, arm: Arm, seed: int, folder: Path) -> list[str]:
    """Those of a real cell's run."""
    return async_real.keys_of(
        settings_of(arm, staleness=options.staleness, update_mode=options.update),
        seed=seed,
        steps=options.steps + options.spare,
        run_dir=folder,
        more=options.run_keys,
        actor_core=options.actor_core,
    )


def _scripted(options: AsyncOptions) -> Measure:
    script = async_scripted.balanced(plain_script(options), options.scripted.balance)

    def measure(arm: Arm, seed: int, folder: Path) -> CellData:
        settings = settings_of(arm, staleness=options.staleness, update_mode=options.update)
        return async_scripted.run_cell(async_scripted.for_arm(script, arm, settings, seed), folder)

    return measure


def plain_script(options: AsyncOptions) -> Script:
    """What all arms have in common; `async_scripted` adds the rest."""
    keys = options.scripted
    token_s = keys.token_ms / 1e3
    return Script(
        arm="",
        seed=0,
        max_staleness=0,
        update_mode=UpdateMode.DRAIN,
        growth="barrier",
        actors=keys.actors,
        slots=keys.slots,
        prompts=keys.prompts,
        segment=keys.segment,
        depth=keys.depth,
        width=keys.width,
        service=Service(
            median_tokens=keys.median,
            tail=keys.tail,
            token_s=token_s,
            prefill_token_s=token_s / PREFILL_SPEED,
            chunk_tokens=keys.segment,
        ),
        train_token_s=0.0,
        publish_s=keys.publish_ms / 1e3,
        load_s=keys.load_ms / 1e3,
        warm_up=1,
        seconds=keys.seconds,
        replay_port=0,
        gate_ports=(),
    )
