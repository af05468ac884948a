"""A cell of scripted processes: how long things take, the processes, and what they told as rows.

The time of training is set so that generation, when it never waits, is `balance` times as fast as training: the two sides of
the comparison are equally large, and what is measured is how they are put together. For that the mean time of a tree is
computed from trees that are grown on a clock which jumps (`async_virtual`). Waits: for the learner's end (`run_cell`'s deadline).
"""

import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from treepo_async.actor.expand import expand
from treepo_async.bench.async_actor import timed_grower
from treepo_async.bench.async_arms import ArmSettings
from treepo_async.bench.async_rows import Account, Arm, CellData, LedgerRow, StepRow, write_lags
from treepo_async.bench.async_script import Script
from treepo_async.bench.async_service import GateTally
from treepo_async.bench.async_virtual import run_virtually
from treepo_async.bench.queue_trees import prompt_of
from treepo_async.engine.fixed import FixedGate
from treepo_async.engine.update_mode import UpdateMode
from treepo_async.errors import TreepoError
from treepo_async.metrics.events import parse
from treepo_async.process import free_ports, run_child

BACKEND = "scripted"
CALIBRATION_TREES = 400
Span = tuple[float, float]
START_S = 60.0
STOP_S = 5.0
SLOWEST_STEP = 30
"""Times the time of training that a step may take before a cell is given up."""


@dataclass(frozen=True, slots=True)
class TreeTimes:
    """Means over trees that never wait for anything but their tokens."""

    grow_s: float
    tokens: float
    """Unique ones."""


def calibrate(script: Script, number: int = CALIBRATION_TREES) -> TreeTimes:
    """Mean time and size of the trees of a script, which are the same for every arm but those of another growth."""

    async def grow_all() -> list[tuple[float, int]]:
        gate = FixedGate(timeout_s=1e9)
        gate.open()
        grower = timed_grower(script, "calibration", gate, GateTally())
        assert grower.make_engine is not None
        trees = []
        for index in range(number):
            rng = random.Random(f"calibration/{index}")
            prompt = prompt_of(index)
            growing = expand(
                prompt,
                grower.make_engine(prompt, rng),
                grower.settings,
                rng,
                lease_id=str(index),
                actor="",
                least_step=0,
            )
            segments, provenance = await growing
            trees.append((provenance.grow_s, sum(map(len, segments))))
        return trees

    trees = run_virtually(grow_all())
    return TreeTimes(fmean(s for s, _ in trees), fmean(n for _, n in trees))


def balanced(script: Script, balance: float) -> Script:
    """The script with a learner for which generation is `balance` times as fast as training."""
    plain = replace(script, growth="barrier")
    times = calibrate(plain)
    batch_s = times.grow_s * script.prompts / (script.actors * script.slots)
    train_s = batch_s * balance - script.publish_s
    if train_s <= 0:
        raise TreepoError(
            f"a batch is grown in {batch_s:.2f} s, publishing takes {script.publish_s} s of that"
        )
    return replace(script, train_token_s=train_s / (times.tokens * script.prompts))


def for_arm(script: Script, arm: Arm, settings: ArmSettings, seed: int) -> Script:
    """The script of a cell; free ports included.

    An arm with the whole machine trains twice as fast. Its generation is no faster: a token's time does not depend on how many
    requests share an engine.
    """
    replay, *gates = free_ports(1 + script.actors)
    speed = 2.0 if settings.has_whole_machine else 1.0
    return replace(
        script,
        arm=arm,
        seed=seed,
        max_staleness=settings.max_staleness,
        update_mode=UpdateMode(settings.update_mode),
        growth=settings.growth,
        train_token_s=script.train_token_s / speed,
        warm_up=1 + settings.max_staleness,
        replay_port=replay,
        gate_ports=tuple(gates),
    )


def run_cell(script: Script, folder: Path) -> CellData:
    """Run the processes of a script in a folder, which is made anew, and read what they told.

    Raises:
        TreepoError: one of them failed, or the learner did not end in time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script.write(folder)
    command = [sys.executable, "-m", "treepo_async.bench.async_roles", str(folder)]
    step_s = script.prompts * script.train_token_s * script.rules.limit * script.width
    limit_s = START_S + script.seconds + SLOWEST_STEP * (1 + script.warm_up) * step_s
    code = run_child(command, log_file=folder / "log", timeout_s=limit_s, stop_s=STOP_S)
    if code != 0:
        words = (folder / "log").read_text(errors="replace")[-1500:]
        raise TreepoError(f"{folder.name}: the processes ended with {code}: {words}")
    shutil.rmtree(folder / "replay", ignore_errors=True)
    return read_cell(script, folder)


# ---------------------------------------------------------------- rows


def read_cell(script: Script, folder: Path) -> CellData:
    """What the processes told, from the end of the warm-up on."""
    told = {file.stem: list(_events(file)) for file in sorted(folder.glob("*.jsonl"))}
    steps = [event for event in told["learner"] if event["event"] == "step"]
    begin, counted = steps[script.warm_up - 1]["at"], steps[script.warm_up :]
    if not counted:
        raise TreepoError(f"{folder.name}: no step ended after the warm-up; take more seconds")
    end = counted[-1]["at"]
    trees = [event for event in told["replay"] if event["event"] == "tree"]
    pauses = [event for event in told["gates"] if event["event"] == "weights"]
    share = _decoded_share(trees, len(steps))
    rows = [_step_row(script, event, begin, pauses, share) for event in counted]
    ledger = [
        *_ledger(script, "learner", _learner_seconds(counted, end - begin)),
        *_ledger(script, "actor", _actor_seconds(script, told, begin, end)),
        *_ledger(script, "engine", _engine_seconds(script, told, begin, end)),
    ]
    return CellData(rows, ledger)


def _events(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        found = parse(line)
        if found is not None:
            yield found


def _decoded_share(trees: Sequence[Mapping[str, Any]], num_steps: int) -> tuple[int, int]:
    """Tokens a step that were decoded, and of these not trained; means over the whole cell, warm-up included."""
    decoded = sum(tree["decoded_tokens"] for tree in trees)
    lost = sum(tree["decoded_tokens"] for tree in trees if tree["outcome"] != "accepted")
    return round(decoded / num_steps), round(lost / num_steps)


def _step_row(
    script: Script,
    event: Mapping[str, Any],
    begin: float,
    pauses: Sequence[Mapping[str, Any]],
    decoded: tuple[int, int],
) -> StepRow:
    lags = {int(lag): tokens for lag, tokens in event["lags"].items()}
    total = sum(lags.values())
    own = [pause for pause in pauses if pause["step"] == event["step"]]

    def mean(of: Callable[[Mapping[str, Any]], float]) -> float:
        return fmean(map(of, own)) if own else float("nan")

    return StepRow(
        backend=BACKEND,
        arm=script.arm,
        seed=script.seed,
        step=event["step"],
        seconds=event["at"] - begin,
        trained_tokens=total,
        trained_tokens_unique=event["unique_tokens"],
        decoded_tokens=decoded[0],
        discarded_tokens=decoded[1],
        staleness_mean=sum(lag * tokens for lag, tokens in lags.items()) / total,
        staleness_max=max(lags),
        lag_tokens=write_lags((lag, tokens / total) for lag, tokens in lags.items()),
        lag_ess="",
        wait_batch_s=event["wait_batch"],
        train_s=event["train"],
        publish_s=event["publish"] + event["ack"],
        pause_s=mean(lambda pause: pause["drain"] + pause["load"]),
        drain_s=mean(lambda pause: pause["drain"]),
        load_s=mean(lambda pause: pause["load"]),
        probe_s=0.0,
    )


def _ledger(script: Script, role: str, seconds: Mapping[Account, float]) -> list[LedgerRow]:
    return [
        LedgerRow(BACKEND, script.arm, script.seed, role, account, spent)
        for account, spent in seconds.items()
    ]


def _learner_seconds(steps: Sequence[Mapping[str, Any]], wall: float) -> dict[Account, float]:
    def total(name: str) -> float:
        return float(sum(step[name] for step in steps))

    booked = {
        Account.COMPUTE: total("train"),
        Account.WAIT_DATA: total("wait_batch"),
        Account.WAIT_QUEUE: total("ack"),
        Account.SYNC: total("publish"),
    }
    return {**booked, Account.IDLE: wall - sum(booked.values())}


def _actor_seconds(
    script: Script, told: Mapping[str, Sequence[Mapping[str, Any]]], begin: float, end: float
) -> dict[Account, float]:
    """Slot-seconds of all actors; what is no wait is growing."""
    waits = {"lease": 0.0, "put": 0.0, "gate": 0.0}
    for index in range(script.actors):
        readings = [e for e in told[f"actor-{index}"] if e["event"] == "slots"]
        for what in waits:
            waits[what] += _at(readings, what, end) - _at(readings, what, begin)
    wall = (end - begin) * script.actors * script.slots
    return {
        Account.COMPUTE: wall - sum(waits.values()),
        Account.WAIT_DATA: waits["lease"],
        Account.WAIT_WEIGHTS: waits["gate"],
        Account.WAIT_QUEUE: waits["put"],
    }


def _engine_seconds(
    script: Script, told: Mapping[str, Sequence[Mapping[str, Any]]], begin: float, end: float
) -> dict[Account, float]:
    """Engine-seconds with the gate closed; open and with a request; and the rest. Each engine until its actor told last."""
    sync, compute, wall = 0.0, 0.0, 0.0
    for engine in range(script.actors):
        readings = [event for event in told[f"actor-{engine}"] if event["event"] == "slots"]
        until = min(end, readings[-1]["at"])
        closed = [
            (event["at"] - event["drain"] - event["load"], event["at"])
            for event in told["gates"]
            if event["event"] == "weights" and event["engine"] == engine
        ]
        closed = [*_within(closed, begin, until)]
        busy = [*_within((span for event in readings for span in event["busy"]), begin, until)]
        sync += _length(closed)
        compute += _length(busy) - sum(_length(_within(busy, *span)) for span in closed)
        wall += until - begin
    return {Account.SYNC: sync, Account.COMPUTE: compute, Account.IDLE: wall - sync - compute}


def _within(spans: Iterable[Sequence[float]], begin: float, end: float) -> Iterator[Span]:
    """The parts of spans of time that lie between two moments."""
    for since, until in spans:
        if since < end and until > begin:
            yield max(since, begin), min(until, end)


def _length(spans: Iterable[Span]) -> float:
    return sum(until - since for since, until in spans)


def _at(readings: Sequence[Mapping[str, Any]], what: str, at: float) -> float:
    """A running sum at a time between two readings, as if it grew evenly."""
    before = max((r for r in readings if r["at"] <= at), key=lambda r: r["at"], default=None)
    after = min((r for r in readings if r["at"] > at), key=lambda r: r["at"], default=None)
    if before is None or after is None:
        known = before or after
        return float(known[what]) if known else 0.0
    share = (at - before["at"]) / (after["at"] - before["at"])
    return float(before[what] + share * (after[what] - before[what]))
