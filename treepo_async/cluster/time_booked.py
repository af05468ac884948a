"""Whether the time of every process of a run is booked, as a pure function of the `ledger` lines in its event log.

A process sums its seconds by what it did, on the clock that its lines have as `begin` and `end`; the driver notes by its own
clock when it heard of them. The three must agree, so time that is booked twice, or not at all, shows.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from treepo_async.cluster.invariants import SHOWN, Verdict

Line = Mapping[str, Any]

SHARE = 0.01
"""Of its time that a process may be off."""
HEARD_S = 2.0
"""By which the driver may hear of one event later than of another; it looks several times a second."""


def time_booked(lines: Iterable[Line]) -> Verdict:
    """The seconds of every process sum to its time, without gaps, by its own clock and the driver's."""
    by_process: dict[tuple[str, int], list[Line]] = defaultdict(list)
    for line in lines:
        by_process[line["process"], line["pid"]].append(line)
    if not by_process:
        return Verdict("time", holds=False, text="no process has told what its time went into")
    wrong = [
        f"{process}: {trouble}"
        for (process, _), of_process in by_process.items()
        if (trouble := _trouble(of_process))
    ]
    wall = sum(line["end"] - line["begin"] for of in by_process.values() for line in of)
    text = f"{wall:.0f} s of {len(by_process)} processes, each within {SHARE:.0%}"
    if wrong:
        text = f"{len(wrong)} of {len(by_process)} processes are off: {'; '.join(wrong[:SHOWN])}"
    return Verdict("time", not wrong, text)


def _trouble(lines: Sequence[Line]) -> str:
    """What is wrong with the time of a process; empty where nothing is."""
    wall = lines[-1]["end"] - lines[0]["begin"]
    booked = sum(sum(line["seconds"].values()) for line in lines)
    between = sum(abs(after["begin"] - before["end"]) for before, after in pairwise(lines))
    gap_s = between + sum(line["gap_s"] for line in lines)
    if abs(booked - wall) > SHARE * wall:
        return f"{booked:.2f} s booked of {wall:.2f} s"
    if gap_s > SHARE * wall:
        return f"{gap_s:.2f} s between its reports"
    moments = [line["heard"] for line in lines if line["heard"] is not None]
    if not moments:
        return ""
    heard, told = (last - first for first, last in zip(moments[0], moments[-1], strict=True))
    if abs(heard - told) > max(HEARD_S, SHARE * told):
        return f"{told:.2f} s told, {heard:.2f} s by the driver's clock"
    return ""
