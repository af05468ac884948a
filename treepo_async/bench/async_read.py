"""From the folder of a finished run to the rows of a cell. Reads `metrics.jsonl` and `config.yaml`; writes nothing.

Of the names in docs/metrics.md it needs those of steps, and `ledger/...` for the roles beside the learner.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

import yaml

from treepo_async.bench.async_rows import (
    Account,
    CellData,
    EvalRow,
    LedgerRow,
    StepRow,
    write_lags,
)
from treepo_async.errors import DataError
from treepo_async.metrics.categories import LEARNER

BACKEND = "real"
TOLD_ROLES = ("actor", "engine", "replay")
"""Roles whose time is known from what they tell every two seconds; the learner's is in each step."""

Record = Mapping[str, Any]


def read_run(run: Path, *, arm: str, seed: int, warm_up: int, last: int) -> CellData:
    """The steps of a run after its warm-up, its ledgers and its evaluations.

    Args:
        run: its folder.
        arm: whose run it is.
        seed: of the run.
        warm_up: steps that are left out, at least 1.
        last: step after which none counts; as many as the run's staleness must follow, in which stock is trained.

    Raises:
        DataError: it has no metrics, too few steps, or was interrupted.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise DataError(f"{file} is not there; give the folder of a run")
    replay = yaml.safe_load((run / "config.yaml").read_text())["replay"]
    records = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [record for record in records if "tokens/unique" in record]
    _check_whole(file, steps, last + replay["max_staleness"])
    counted = steps[warm_up:last]
    began = steps[warm_up - 1]["time"]
    rows, seconds = list[StepRow](), 0.0
    for record in counted:
        seconds += record["time/wall_s"]
        rows.append(_step_row(record, arm, seed, seconds, replay["prompts_per_batch"]))
    evals = [
        EvalRow(
            BACKEND,
            arm,
            seed,
            record["step"],
            record["time"] - began,
            record["eval/sampled_accuracy"],
            record["eval/greedy_accuracy"],
        )
        for record in records
        if "eval/sampled_accuracy" in record
    ]
    return CellData(rows, list(_ledger(counted, arm, seed)), evals)


def _check_whole(file: Path, steps: Sequence[Record], least: int) -> None:
    """A learner that went back to a checkpoint did some of the work twice, and nobody timed what lay between."""
    again = [record["step"] for record in steps if record["learner/lineage"] > 0]
    if again:
        raise DataError(
            f"{file}: the learner was started again (learner/lineage is above 0 from step {again[0]} on), "
            "so its time is not that of a whole run; make the run anew"
        )
    if [record["step"] for record in steps] != list(range(1, len(steps) + 1)):
        raise DataError(f"{file} has not one record for each step; make the run anew")
    if len(steps) < least:
        raise DataError(
            f"{file} has {len(steps)} steps; it takes {least}, as in the last of them nothing is decoded any more"
        )


def _step_row(
    record: Record, arm: str, seed: int, seconds: float, prompts_per_batch: int
) -> StepRow:
    tokens, ess = _by_lag(record, "tokens"), _by_lag(record, "ess")
    total = round(sum(tokens.values()))
    return StepRow(
        backend=BACKEND,
        arm=arm,
        seed=seed,
        step=record["step"],
        seconds=seconds,
        trained_tokens=total,
        trained_tokens_unique=record["tokens/unique"],
        decoded_tokens=record["tokens/decoded"],
        discarded_tokens=round(record["tokens/decoded"] * _untrained_share(record)),
        staleness_mean=_number(record, "staleness/mean"),
        staleness_max=record["staleness/max"] or 0,
        lag_tokens=write_lags((lag, count / total) for lag, count in tokens.items()),
        lag_ess=write_lags(ess.items()),
        wait_batch_s=_number(record, "time/wait_batch_s"),
        train_s=_number(record, "time/train_s"),
        publish_s=_number(record, "time/publish_s"),
        ess=_number(record, "learner/ess"),
        reward=_number(record, "reward/mean"),
        pause_s=_number(record, "weights/pause_s"),
        drain_s=_number(record, "weights/drain_s"),
        load_s=_number(record, "weights/load_s"),
        probe_s=_number(record, "weights/probe_s"),
        arrived_trees=record.get("trees/accepted", 0),
        trained_trees=prompts_per_batch,
    )


def _by_lag(record: Record, column: str) -> dict[int, float]:
    """A column of the table of lags; that of 8 and more counts as 8, tokens of unknown lag as none."""
    found = {}
    for name, value in record.items():
        axis, _, rest = name.partition("/")
        lag, _, of = rest.partition("/")
        if axis == "lag" and of == column and value is not None and lag.rstrip("+").isdigit():
            found[int(lag.rstrip("+"))] = float(value)
    return found


def _untrained_share(record: Record) -> float:
    """Share of the trees that arrived and are not trained; their tokens are taken to be as many as the others'."""
    ends = {
        name: count
        for name, count in record.items()
        if name.startswith("trees/") and name not in ("trees/fallback_runs", "trees/pruned_paths")
    }
    total = sum(ends.values())
    return 1 - ends.get("trees/accepted", 0) / total if total else 0.0


def _ledger(records: Sequence[Record], arm: str, seed: int) -> Iterator[LedgerRow]:
    """Seconds of each role; those of a role that has several processes are of all of them."""
    seconds = {"learner": _learner_seconds(records)}
    seconds |= {role: _told_seconds(records, role) for role in TOLD_ROLES}
    for role, accounts in seconds.items():
        for account in Account:
            if accounts:
                yield LedgerRow(BACKEND, arm, seed, role, account, accounts.get(account, 0.0))


def _learner_seconds(records: Sequence[Record]) -> dict[str, float]:
    """Exactly those of the steps."""
    found: defaultdict[str, float] = defaultdict(float)
    for record in records:
        for activity, category in LEARNER.items():
            found[category] += record.get(f"time/{activity}_s") or 0.0
    return found


def _told_seconds(records: Sequence[Record], role: str) -> dict[str, float]:
    """A record has shares of what was told since the last one, which may be more or less than the time of its step."""
    found: defaultdict[str, float] = defaultdict(float)
    for record in records:
        told = record.get(f"ledger/{role}/seconds", 0.0)
        for account in Account:
            if told:
                found[account] += told * record[f"ledger/{role}/{account}"]
    return found


def _number(record: Record, name: str) -> float:
    value = record.get(name)
    return nan if value is None else float(value)
