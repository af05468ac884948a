"""The lineages of a run and where each began: a small file beside the checkpoints, written before a lineage does anything.

Neighbours: the learner's rank 0 writes it as it starts, `learner.ancestry` reads from it which versions are the same weights.

Invariant: a lineage is in the file before its name is anywhere else, and never changed, so no two starts share one.
"""

import json
from pathlib import Path

from treepo_async.errors import WeightsError
from treepo_async.types import PolicyVersion
from treepo_async.weights.durable import make_folder
from treepo_async.weights.manifest import UNREADABLE
from treepo_async.wire.whole_file import whole_file

LINEAGES_FILE = "lineages.json"


class Lineages:
    """The file in one folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / LINEAGES_FILE

    def origins(self) -> dict[int, PolicyVersion]:
        """The version that each lineage began from; the initial model is 0.0.

        Raises:
            WeightsError: the file is damaged.
        """
        if not self._file.exists():
            return {}
        try:
            raw = json.loads(self._file.read_text())
            return {int(name): PolicyVersion.parse(origin) for name, origin in raw.items()}
        except UNREADABLE as error:
            raise WeightsError(
                f"{self._file} is damaged: {error}; remove it to go on: trees that are waiting then count as "
                "sampled by other weights, and are corrected"
            ) from error

    def begin(self, lineage: int, origin: PolicyVersion) -> None:
        """Note, durably, that a lineage begins.

        Raises:
            WeightsError: it has begun before, or the file is damaged.
        """
        known = self.origins()
        if lineage in known:
            raise WeightsError(
                f"{self._file}: lineage {lineage} began from {known[lineage]} before"
            )
        names = {str(name): str(found) for name, found in {**known, lineage: origin}.items()}
        make_folder(self._file.parent)
        with whole_file(self._file) as file:
            file.write(json.dumps(names).encode())
