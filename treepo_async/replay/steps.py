"""What the learner did, by step and lineage: which step it began, what came out, and which lineage may speak.

A learner that goes back to a checkpoint works under a further lineage; from its first word on the lineages before it are
rolled back and refused, so that of two learners only the later one moves the queue. Results are kept until their step is
retired: a step that is done again can be compared with what it was.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from treepo_async.errors import RefusedError
from treepo_async.replay.state import StepRow


@dataclass
class Steps:
    """See the module."""

    lineages: dict[int, int] = field(default_factory=lambda: {0: 0})
    """Newest policy step that there is of each lineage."""
    results: dict[int, dict[int, str]] = field(default_factory=dict)
    """Of the steps that are not retired: digest by lineage, empty while there is none."""
    _touched: list[StepRow] = field(default_factory=list)

    @classmethod
    def of(cls, lineages: Mapping[int, int], rows: Iterable[StepRow]) -> Self:
        """The steps of a state."""
        steps = cls(dict(lineages))
        for lineage, step, digest in rows:
            steps.results.setdefault(step, {})[lineage] = digest
        return steps

    def rows(self) -> tuple[StepRow, ...]:
        """All that are not retired."""
        return tuple(
            StepRow(lineage, step, digest)
            for step, results in self.results.items()
            for lineage, digest in results.items()
        )

    def take_touched(self) -> tuple[StepRow, ...]:
        """Rows that changed since the last call."""
        touched, self._touched = tuple(self._touched), []
        return touched

    def meet(self, lineage: int, step: int) -> None:
        """A learner works on the weights of a lineage, which are at `step` at least.

        Raises:
            RefusedError: a later lineage has taken its place.
        """
        newest = max(self.lineages)
        if lineage < newest:
            raise RefusedError(
                "rolled_back",
                f"lineage {lineage} was rolled back, lineage {newest} goes on from an earlier step",
                retry=False,
            )
        self.lineages[lineage] = max(step, self.lineages.get(lineage, 0))

    def begin(self, step: int, lineage: int) -> None:
        """The learner takes the batch of a step, to change the weights of a lineage with it.

        Raises:
            RefusedError: the lineage was rolled back.
        """
        self.meet(lineage, step)
        if lineage not in self.results.get(step, {}):
            self._note(step, lineage, "")

    def end(self, step: int, lineage: int, digest: str) -> str | None:
        """The update of a step is made. Gives the digest of another lineage that differs, if there is one.

        Raises:
            RefusedError: the lineage was rolled back.
        """
        self.meet(lineage, step)
        found = self.results.get(step, {})
        others = [other for name, other in found.items() if name != lineage]
        if found.get(lineage) != digest:
            self._note(step, lineage, digest)
        return next((other for other in others if other not in ("", digest)), None)

    def retire(self, step: int) -> None:
        """Results up to and including `step` are not needed any more."""
        self.results = {kept: found for kept, found in self.results.items() if kept > step}

    def _note(self, step: int, lineage: int, digest: str) -> None:
        self.results.setdefault(step, {})[lineage] = digest
        self._touched.append(StepRow(lineage, step, digest))
