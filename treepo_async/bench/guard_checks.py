"""The ratios of `bench.py guard`: what is measured, by which command, and how the ratio is read from its files.

Commands are those of `launch/bench.py`, small, each in a process and a folder of its own; `sim`, `codec` and `trees` are
measured in this one. Where a part works alone its processor time is taken, which other work on the machine changes little.
A ratio of two of our own ways does not see what slows both down; those with `_plain` in their name, `codec`, `wire` and `weights`
are over something that is none of ours. Larger is better in each. Waits: for a command (`COMMAND_S`).
"""

import csv
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from treepo_async.bench import async_cells, sim_arms
from treepo_async.bench.async_rows import Arm
from treepo_async.bench.async_summary import summarize
from treepo_async.bench.guard import Check
from treepo_async.bench.queue_trees import make_tree
from treepo_async.bench.sim_trees import LogNormal, TreeShape, draw_plan
from treepo_async.errors import TreepoError
from treepo_async.process import run_child
from treepo_async.types import Tree
from treepo_async.wire.codec import decode_tree, digest_of, encode_tree

COMMAND_S = 300.0
STOP_S = 5.0
CODEC_TOKENS = 65_536
CODEC_ROUNDS = 15
CODEC_COPIES = 20
"""In a row: a single one is too short for the clock."""
PRODUCTS = 2000
"""Of square matrices in a row, so small that a single thread computes them."""
PRODUCT_SIZE = 64
PRODUCT_ROUNDS = 51
SIM_STEPS = 24
NUM_TREES = 200
_LAUNCH = Path(__file__).resolve().parents[2] / "launch" / "bench.py"
_ASYNC = "async backend=scripted arms=sync,async_inflight seeds=0 seconds=6"
_LEARNER = "learner branching=spread width=8 depth=4 segment=32 prompt=16 shape=2x128 rounds=5"
_QUEUE = "queue tokens=4096 burst=32 rounds=7 seconds=0"
Row = dict[str, str]


def all_checks() -> list[Check]:
    """In the order in which they are run: the cheap ones first."""
    bursts = _Shared(_QUEUE, "bursts.csv")
    passes = _Shared(_LEARNER, "samples.csv")
    arms = _Shared(_ASYNC, "cells.csv")
    return [
        Check(
            "sim",
            "simulated: async_inflight over sync, trained tokens/s",
            "python launch/bench.py async backend=sim arms=sync,async_inflight seeds=0",
            sim_ratio,
            is_exact=True,
        ),
        Check(
            "trees",
            "delivered over decoded tokens of drawn trees",
            "python launch/bench.py guard only=trees",
            trees_ratio,
            is_exact=True,
        ),
        Check(
            "codec",
            "copying a tree's arrays over encoding, digesting and decoding it",
            "python launch/bench.py guard only=codec",
            codec_ratio,
        ),
        passes.check("learner", "processor time of flat packing over tree packing", learner_ratio),
        passes.check(
            "learner_plain",
            "processor time of fixed matrix products over tree packing",
            lambda rows: learner_plain_ratio(rows, products_s()),
        ),
        bursts.check(
            "wire",
            "processor time of bare sockets over that of the wire, a tree",
            lambda rows: burst_ratio(rows, "bare", "wire"),
        ),
        bursts.check(
            "durable",
            "processor time of one commit a tree over that of common commits",
            lambda rows: burst_ratio(rows, "single", "durable"),
        ),
        arms.check(
            "async",
            "scripted: async_inflight over sync, trained tokens/s",
            lambda rows: arm_ratio(rows, Arm.ASYNC_INFLIGHT, Arm.SYNC),
        ),
        arms.check(
            "async_plain",
            "a step of sync by its script, simulated, over the scripted one",
            lambda rows: async_plain_ratio(rows, sync_step_s()),
        ),
        _Shared("weights layers=4 hidden=512 rounds=3 stages=1", "updates.csv").check(
            "weights",
            "a plain copy over weights by disk, from publication to use",
            lambda rows: weights_ratio(rows, "disk"),
        ),
    ]


# ---------------------------------------------------------------- in this process


def sim_ratio() -> float:
    """Of two simulated arms, with one seed."""
    options = async_cells.parse(["backend=sim", f"steps={SIM_STEPS}"])
    cells = [sim_arms.measure(options, arm, seed=0) for arm in (Arm.ASYNC_INFLIGHT, Arm.SYNC)]
    inflight, sync = summarize(cells)
    return inflight.tokens_per_s / sync.tokens_per_s


def trees_ratio() -> float:
    """Of trees of 16 paths and 7 segments whose responses have a heavy tail."""
    rng = random.Random("guard")
    plans = [draw_plan(TreeShape(), LogNormal(40, 2), rng) for _ in range(NUM_TREES)]
    return sum(plan.leaf_tokens for plan in plans) / sum(plan.tokens for plan in plans)


def codec_ratio(round_trip: Callable[[Tree], object] | None = None) -> float:
    """Of processor time: median over rounds, each a copy and a round trip.

    Args:
        round_trip: what stands for the codec; default: it.
    """
    tree = make_tree(CODEC_TOKENS, 256)
    carry = round_trip or _round_trip
    ratios = list[float]()
    for _ in range(CODEC_ROUNDS):
        copy_s = _seconds(lambda: [_copies(tree) for _ in range(CODEC_COPIES)]) / CODEC_COPIES
        ratios.append(copy_s / _seconds(lambda: carry(tree)))
    return statistics.median(ratios)


def products_s(rounds: int = PRODUCT_ROUNDS) -> float:
    """Processor time of fixed matrix products, median over rounds."""
    rng = np.random.default_rng(0)
    many = rng.random((PRODUCTS, PRODUCT_SIZE, PRODUCT_SIZE), dtype=np.float32)
    return statistics.median(_seconds(lambda: many @ many[0]) for _ in range(rounds))


def sync_step_s() -> float:
    """Of a synchronous run in which nothing but the script takes time: T_gen, training and publication."""
    options = async_cells.parse(["backend=sim", f"steps={SIM_STEPS}"])
    (sync,) = summarize([sim_arms.measure(options, Arm.SYNC, seed=0)])
    return sync.step_s


def _round_trip(tree: Tree) -> Tree:
    frames = encode_tree(tree)
    digest_of(frames)
    return decode_tree(frames)


def _copies(tree: Tree) -> list[tuple[bytes, bytes]]:
    return [(s.token_ids.tobytes(), s.behavior_logprobs.tobytes()) for s in tree.segments]


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


# ---------------------------------------------------------------- commands


def learner_ratio(rows: Sequence[Row]) -> float:
    """Of flat to tree packing, over all rounds."""
    return _total(rows, "way", "flat", "cpu_s") / _total(rows, "way", "tree", "cpu_s")


def learner_plain_ratio(rows: Sequence[Row], plain_s: float) -> float:
    """Of a fixed time to that of tree packing, over all rounds."""
    return plain_s / _total(rows, "way", "tree", "cpu_s")


def burst_ratio(rows: Sequence[Row], first: str, second: str) -> float:
    """The same of replay's processor time for bursts of two arms, which deliver as many trees."""
    return _total(rows, "arm", first, "replay_cpu_s") / _total(rows, "arm", second, "replay_cpu_s")


def arm_ratio(rows: Sequence[Row], fast: Arm, slow: Arm) -> float:
    """Of two arms of the comparison."""
    rates = {row["arm"]: float(row["tokens_per_s"]) for row in rows}
    return rates[fast] / rates[slow]


def async_plain_ratio(rows: Sequence[Row], script_s: float) -> float:
    """Of the step time that a script asks for to that of `sync`, which has everything else in it."""
    (step_s,) = (float(row["step_s"]) for row in rows if row["arm"] == Arm.SYNC)
    return script_s / step_s


def weights_ratio(rows: Sequence[Row], arm: str) -> float:
    """Median over updates."""
    own = [row for row in rows if row["arm"] == arm]
    return statistics.median(float(row["copy_s"]) / float(row["visible_s"]) for row in own)


def _total(rows: Sequence[Row], column: str, value: str, clock: str) -> float:
    return sum(float(row[clock]) for row in rows if row[column] == value)


class _Shared:
    """A command whose rows one or more checks read: it runs again for one that has read them already."""

    def __init__(self, words: str, file: str) -> None:
        self._words, self._file = words, file
        self._rows: list[Row] = []
        self._readers: set[str] = set()

    def check(self, name: str, what: str, read: Callable[[Sequence[Row]], float]) -> Check:
        """One that reads its rows."""
        command = f"python launch/bench.py {self._words}"
        return Check(name, what, command, lambda: read(self._rows_for(name)))

    def _rows_for(self, reader: str) -> list[Row]:
        if not self._rows or reader in self._readers:
            self._rows, self._readers = _rows_of(self._words, self._file), set()
        self._readers.add(reader)
        return self._rows


def _rows_of(words: str, file: str) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="guard-") as folder:
        out = Path(folder) / "out"
        _run([*words.split(), f"out={out}"], Path(folder) / "log")
        with (out / file).open(newline="") as rows:
            return list(csv.DictReader(rows))


def _run(words: Sequence[str], log_file: Path) -> None:
    command = [sys.executable, str(_LAUNCH), *words]
    code = run_child(command, log_file=log_file, timeout_s=COMMAND_S, stop_s=STOP_S)
    if code:
        said = log_file.read_text(errors="replace")[-500:]
        raise TreepoError(f"bench.py {' '.join(words)} ended with {code}: {said}")
