"""Where each segment of a growing tree has its KV entries, and what it cost that some were not where they were wanted.

Told every completion in turn. What a request before a completion computed for it (`warmed_tokens`) counts as its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from treepo_async.engine.answer import Completion
from treepo_async.engine.routing import Move, Place
from treepo_async.types import ROOT


@dataclass
class Places:
    """See the module."""

    num_children: int = 0
    """Runs that continued a segment."""
    num_spilled: int = 0
    """Those that left the engine of their parent because it had too much to do."""
    num_migrated: int = 0
    """Those that left it because it was out."""
    moved_tokens: int = 0
    """Prefix tokens that another engine computed again for these."""
    refilled_tokens: int = 0
    """Prefix tokens that the parent's engine computed again since it had got other weights."""
    _by_segment: dict[int, Place] = field(default_factory=dict)

    def begin(self, place: Place) -> None:
        """The tree begins on an engine."""
        self._by_segment[ROOT] = place

    def of(self, segment: int) -> Place | None:
        """Where a path up to a segment, or `ROOT`, is; None before anything is known.

        What was kept of an earlier tree is where the prompt is.
        """
        return self._by_segment.get(segment, self._by_segment.get(ROOT))

    def add(self, parent: int, segments: Iterable[int], completion: Completion) -> None:
        """Take a run that continued `parent` and became `segments`."""
        home, place = self.of(parent), Place(completion.engine, completion.submitted)
        self._by_segment.setdefault(ROOT, place)
        for segment in segments:
            self._by_segment[segment] = place
        if parent == ROOT:
            return
        self.num_children += 1
        computed = completion.prefix_tokens - completion.cached_tokens + completion.warmed_tokens
        if completion.move is not Move.HOME:
            self.num_spilled += completion.move is Move.SPILLED
            self.num_migrated += completion.move is Move.MIGRATED
            self.moved_tokens += computed
        elif home is not None and home.version not in (None, place.version):
            self.refilled_tokens += computed

    def costs(self) -> dict[str, int]:
        """The counts, by their names in a tree's provenance."""
        return {
            "num_children": self.num_children,
            "num_spilled": self.num_spilled,
            "num_migrated": self.num_migrated,
            "moved_tokens": self.moved_tokens,
            "refilled_tokens": self.refilled_tokens,
        }
