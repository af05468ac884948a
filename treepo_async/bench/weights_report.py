"""Updates in words: lines of the console, `updates.csv`, `table.md`.

Ratios are of an update and the plain copy just before it, and then the median: what slows the machine for a while slows both.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from treepo_async.bench.rows import append_rows
from treepo_async.bench.summary import Spread

NOTES = (
    "Medians of seconds, (least - most) of the ratio. visible: from the beginning of the publication until the gate is open under the "
    "new weights, every check included. publish: until the learner may train on, a part of it. pause: without a request, and its parts: "
    "the last requests and the flush, the load, the proof. copy: the same bytes into a new file in the same folder and back into memory, "
    "just before."
)


@dataclass(frozen=True, slots=True)
class Update:
    """One update; seconds."""

    arm: str
    round: int
    mib: float
    copy_s: float
    visible_s: float
    publish_s: float
    pause_s: float
    drain_s: float
    load_s: float
    probe_s: float
    gap: float
    """Nats between engine and learner on the probe."""

    @property
    def ratio(self) -> float:
        """Of the update to the plain copy."""
        return self.visible_s / self.copy_s


def append(file: Path, update: Update) -> None:
    """Add a row."""
    append_rows(file, [entry.name for entry in fields(Update)], [asdict(update)])


def line(update: Update) -> str:
    """For the console."""
    return (
        f"  {update.arm:<12} visible {update.visible_s:.3f} s = {update.ratio:.2f} copies of {update.copy_s:.3f} s; "
        f"publish {update.publish_s:.3f}, pause {update.pause_s:.3f} (drain {update.drain_s:.3f}, load {update.load_s:.3f}, "
        f"probe {update.probe_s:.3f})"
    )


def table(updates: Sequence[Update]) -> str:
    """One row an arm."""
    names = ("copy", "visible", "publish", "pause", "drain", "load", "probe")
    rows = [["arm", "updates", "ratio to the copy", *names], ["---"] * (3 + len(names))]
    for arm in dict.fromkeys(update.arm for update in updates):
        own = [update for update in updates if update.arm == arm]
        ratio = Spread.of(update.ratio for update in own)
        medians = [Spread.of(getattr(u, f"{name}_s") for u in own).median for name in names]
        rows.append(
            [
                arm,
                str(len(own)),
                f"{ratio.median:.2f} ({ratio.low:.2f} - {ratio.high:.2f})",
                *(f"{seconds:.3f}" for seconds in medians),
            ]
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, "", NOTES]) + "\n"
