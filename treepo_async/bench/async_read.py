"""From the folder of a finished run to the rows of a cell. Reads `metrics.jsonl`; writes nothing.

Of the names in docs/metrics.md it needs those of steps; `ledger/...` where a run has them, else the learner's share of waiting
and the engine's of idling stand for the ledgers of the two.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any

from treepo_async.bench.async_rows import (
    Account,
    CellData,
    EvalRow,
    LedgerRow,
    StepRow,
    write_lags,
)
from treepo_async.errors import DataError

BACKEND = "real"
ROLES = ("learner", "actor", "engine", "replay")

Record = Mapping[str, Any]


def read_run(run: Path, *, arm: str, seed: int, warm_up: int) -> CellData:
    """The steps of a run after its warm-up, its ledgers and its evaluations.

    Raises:
        DataError: it has no metrics, or no step after the warm-up.
    """
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise DataError(f"{file} is not there; give the folder of a run")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    steps = _last_of_each(record for record in records if "tokens/unique" in record)
    if len(steps) <= warm_up:
        raise DataError(f"{file} has {len(steps)} steps, none after the first {warm_up}")
    counted = steps[warm_up:]
    began = steps[warm_up - 1]["time"]
    rows, seconds = list[StepRow](), 0.0
    for record in counted:
        seconds += record["time/wall_s"]
        rows.append(_step_row(record, arm, seed, seconds))
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


def _last_of_each(records: Iterator[Record]) -> list[Record]:
    """Of the records of one step the later one counts."""
    return [record for _, record in sorted({record["step"]: record for record in records}.items())]


def _step_row(record: Record, arm: str, seed: int, seconds: float) -> StepRow:
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
    """Seconds of an average slot of each role, from its shares of the wall time of each step."""
    for role in ROLES:
        for account in Account:
            name = f"ledger/{role}/{account}"
            if any(name in record for record in records):
                shares = ((record.get(name) or 0.0, record["time/wall_s"]) for record in records)
                seconds = sum(share * wall for share, wall in shares)
                yield LedgerRow(BACKEND, arm, seed, role, account, seconds)
        if not any(name.startswith(f"ledger/{role}/") for record in records for name in record):
            yield from _poor_ledger(records, arm, seed, role)


def _poor_ledger(records: Sequence[Record], arm: str, seed: int, role: str) -> Iterator[LedgerRow]:
    name = {"learner": "idle/learner", "engine": "idle/engine"}.get(role)
    if name is None:
        return
    wall = sum(record["time/wall_s"] for record in records)
    idle = sum((record.get(name) or 0.0) * record["time/wall_s"] for record in records)
    waits = Account.WAIT_DATA if role == "learner" else Account.IDLE
    yield LedgerRow(BACKEND, arm, seed, role, waits, idle)
    yield LedgerRow(BACKEND, arm, seed, role, Account.COMPUTE, wall - idle)


def _number(record: Record, name: str) -> float:
    value = record.get(name)
    return nan if value is None else float(value)
