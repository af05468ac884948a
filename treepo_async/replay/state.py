"""Where the queue stands, as values: all that is needed to go on after its process has ended, and what changed last.

    Counts      numbers of the whole queue
    QueueState  counts, and a row for each entry that is live or in a batch that is kept
    Changes     counts as they are now, rows that changed, and steps of the learner that changed

`replay.store` writes `Changes` and gives a `QueueState` back. The invariant of both is conservation: every prompt ever
leased is live, in a batch that is kept, or counted as ended; and prompts keep their order, which is that of their indexes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from typing import Any, NamedTuple, Self

from treepo_async.errors import DataError
from treepo_async.replay.entry import FINAL, LIVE, Row, State


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of the queue; without arguments those of a queue that begins."""

    next_index: int = 0
    """Prompt that is leased next; also the number of prompts ever leased."""
    next_step: int = 0
    """Step whose batch is consumed next."""
    published: int = 0
    """Policy step of the newest publication."""
    num_retired: int = 0
    """Batches that every checkpoint covers; those of steps from here to `next_step` are kept."""
    refills: int = 0
    exhausted: bool = False
    num_lost: int = 0
    """Prompts in a row that ended without a scored tree."""
    lineages: Mapping[int, int] = field(default_factory=lambda: {0: 0})
    """Newest policy step that there is of each lineage."""
    ended: Mapping[str, int] = field(default_factory=dict)
    """Number of entries that have left the queue, by final state."""
    reasons: Mapping[str, int] = field(default_factory=dict)
    """Why leases failed, and why entries were dropped or quarantined."""

    def to_json(self) -> str:
        """As text that `parse` reads back."""
        return json.dumps(self._values())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is something else.
        """
        try:
            raw = json.loads(text)
            names = {entry.name for entry in fields(cls)}
            if not isinstance(raw, dict) or raw.keys() != names:
                raise DataError(f"counts are {text[:200]}, expected {sorted(names)}")
            raw["lineages"] = {int(lineage): step for lineage, step in raw["lineages"].items()}
            return cls(**raw)
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"counts cannot be read: {error}") from error

    def _values(self) -> dict[str, Any]:
        """By name, for JSON; `asdict` would copy every number of them."""
        return {name: getattr(self, name) for name in self.__slots__}


class StepRow(NamedTuple):
    """A step of the learner: that it began, and once its update is made, what came out."""

    lineage: int
    step: int
    digest: str
    """Of its result; empty while it has none."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What happened to a queue since the last ones were taken."""

    counts: Counts
    rows: tuple[Row, ...] = ()
    gone: tuple[int, ...] = ()
    """Prompt indexes that count as never leased."""
    steps: tuple[StepRow, ...] = ()

    def to_json(self) -> str:
        """As text that `parse` reads back."""
        rows, steps = [*map(list, self.rows)], [*map(list, self.steps)]
        return json.dumps([self.counts._values(), rows, list(self.gone), steps])

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is something else.
        """
        try:
            counts, rows, gone, steps = json.loads(text)
            return cls(
                Counts.parse(json.dumps(counts)),
                tuple(row_of(row) for row in rows),
                tuple(int(index) for index in gone),
                tuple(StepRow(*step) for step in steps),
            )
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"changes cannot be read: {error}") from error


def row_of(values: Any) -> Row:
    """A row from a list of its values."""
    index, state, attempt, owner, failed, step, oldest_step, reason, uncounted = values
    return Row(index, state, attempt, owner, tuple(failed), step, oldest_step, reason, uncounted)


@dataclass(frozen=True, slots=True)
class QueueState:
    """See the module; without arguments it is where a run begins."""

    counts: Counts = field(default_factory=Counts)
    rows: tuple[Row, ...] = ()
    """Live and consumed entries, by prompt index."""
    steps: tuple[StepRow, ...] = ()
    """Those that are not retired."""

    def check(self) -> None:
        """Raise DataError where the numbers contradict each other."""
        counts = self.counts
        indexes = [row.prompt_index for row in self.rows]
        if indexes != sorted(set(indexes)) or (indexes and indexes[-1] >= counts.next_index):
            raise DataError("rows are not in lease order below next_index")
        if not counts.ended.keys() <= set(FINAL):
            raise DataError(f"ended has {sorted(counts.ended)}, expected only {[*map(str, FINAL)]}")
        known = len(indexes) + sum(counts.ended.values())
        if known != counts.next_index:
            raise DataError(f"rows and ended are {known} prompts of {counts.next_index}")
        self._check_steps()

    def resumed_at(self, step: int) -> "QueueState":
        """Where a run goes on whose learner begins again at policy step `step`; all batches from it on are given out again.

        Nobody holds a lease any more, and none of them counts as an attempt: its actor ended with the run before.
        Whether the data has ended is found out anew: there may be more of it now. So is whether prompts are lost.

        Raises:
            DataError: the batches from `step` on are not kept here, or not reached yet.
        """
        low, high = self.counts.num_retired, self.counts.next_step
        if not low <= step <= high:
            raise DataError(f"a run can go on from policy steps {low} to {high}, not from {step}")
        rows = tuple(_resumed(row, step) for row in self.rows)
        return replace(
            self,
            counts=replace(self.counts, published=step, exhausted=False, num_lost=0),
            rows=rows,
        )

    def _check_steps(self) -> None:
        counts = self.counts
        consumed = [row for row in self.rows if row.state not in LIVE]
        steps = [step for step, _ in groupby(row.step for row in consumed)]
        wanted = list(range(counts.num_retired, counts.next_step))
        if steps != wanted:
            raise DataError(f"consumed rows have the steps {steps}, expected {wanted}")
        first_live = next((row.prompt_index for row in self.rows if row.state in LIVE), None)
        if first_live is not None and consumed and consumed[-1].prompt_index > first_live:
            raise DataError(f"prompt {first_live} is live before consumed ones")
        if any(row.state not in (State.CONSUMED, State.TRAINED) for row in consumed):
            raise DataError("rows of ended entries are not kept here")


def _resumed(row: Row, step: int) -> Row:
    if row.state == State.LEASED:
        return row._replace(state=str(State.WAITING), owner="", uncounted=row.uncounted + 1)
    if row.step is not None and row.step >= step:
        return row._replace(state=str(State.CONSUMED))
    return row
