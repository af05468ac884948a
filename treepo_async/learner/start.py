"""Where the learner's loop begins: from which weights, under which lineage, and what was published before. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from treepo_async.learner.ancestry import Ancestry
from treepo_async.types import Int32, PolicyVersion
from treepo_async.weights.checkpoints import TrainingState

INITIAL = PolicyVersion(0, 0)
"""Of the initial model, whatever lineage begins with it."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the loop begins."""

    version: PolicyVersion
    """Of the weights it begins with."""
    origin: PolicyVersion
    """Their name before: that of the checkpoint, or of the initial model."""
    ancestry: Ancestry
    newest_published: int = -1
    """Policy step of the newest publication there is, -1 without any."""
    probe_sequences: Sequence[Int32] = ()
    """[T] each, where the weights come from a checkpoint."""

    @classmethod
    def of(
        cls,
        state: TrainingState | None,
        *,
        published: Sequence[PolicyVersion],
        saved: Sequence[PolicyVersion],
        origins: Mapping[int, PolicyVersion],
        lineage: int,
    ) -> Self:
        """After a checkpoint, or without one.

        Args:
            state: of the checkpoint that was loaded; None for the initial model.
            published: all versions that engines may have.
            saved: versions of all checkpoints, damaged ones too.
            origins: the version that each lineage so far began from.
            lineage: least one that may be used.
        """
        used = [*(version.lineage for version in [*published, *saved]), *origins]
        origin = INITIAL if state is None else state.policy_version
        version = PolicyVersion(max(lineage, max(used, default=-1) + 1), origin.step)
        inherited = {} if state is None else state.ancestry
        return cls(
            version,
            origin,
            Ancestry.of(
                version.lineage,
                {**origins, version.lineage: origin},
                {int(other): step for other, step in inherited.items()},
            ),
            newest_published=max((found.step for found in published), default=-1),
            probe_sequences=[]
            if state is None
            else [np.array(ids, np.int32) for ids in state.probe_token_ids],
        )
