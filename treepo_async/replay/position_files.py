"""The queue's positions on disk, under `<run_dir>/replay/`.

    position.json       the newest one, for a replay that is started again in the same run
    position-<k>.json   the one at the publication of policy step k, for a run resumed from the checkpoint at k

Each is replaced by one rename after it has reached the disk, so whoever reads one reads all of it. A position is
written before the message that brought it about is answered: what a peer was told is never forgotten. Those for a
resume are kept as far back as checkpoints are, and all since then.
"""

import re
from pathlib import Path

from treepo_async.errors import ConfigError, DataError
from treepo_async.replay.position import QueuePosition
from treepo_async.wire.whole_file import whole_file

NEWEST = "position.json"
_OF_STEP = re.compile(r"position-(\d{1,18})\.json")


class PositionFiles:
    """The positions of one run."""

    def __init__(self, folder: Path, run_id: str, *, kept_steps: int) -> None:
        """Name the folder, which is made when the first one is written.

        Args:
            folder: of all positions.
            run_id: written into each.
            kept_steps: the oldest checkpoint that is kept is at most so many steps older than the newest.
        """
        self.folder = folder
        self._run_id, self._kept_steps = run_id, kept_steps
        self._written: QueuePosition | None = None

    def start(self, resume_step: int | None) -> QueuePosition:
        """Where to begin: at the newest position of this very run, at a checkpoint of an earlier one, or anew.

        Args:
            resume_step: policy step of the checkpoint that the run goes on from, None for a new run.

        Raises:
            ConfigError: the folder belongs to another run, and none is resumed.
            DataError: the file to start from is missing or damaged.
        """
        newest = self._read(NEWEST) if (self.folder / NEWEST).exists() else None
        if newest is not None and newest[0] == self._run_id:
            return newest[1]
        if resume_step is not None:
            position = self._resumed(resume_step)
        elif newest is None:
            position = QueuePosition()
            self._write(_of_step(0), position)
        else:
            raise ConfigError(
                f"{self.folder / NEWEST} was written by run {newest[0]}, this is run {self._run_id}: "
                "resume that run, or give this one a run_dir of its own"
            )
        self.write(position)
        return position

    def write(self, position: QueuePosition) -> None:
        """Make it the newest one, if it is not; returns once it is on disk."""
        if position != self._written:
            self._write(NEWEST, position)
            self._written = position

    def write_published(self, step: int, position: QueuePosition) -> None:
        """Keep it for a resume at policy step `step`, and make it the newest one."""
        self._write(_of_step(step), position)
        self.write(position)

    def write_retired(self, position: QueuePosition) -> None:
        """Make it the newest one, and remove those of steps that no checkpoint is kept of any more."""
        self.write(position)
        for file in self.folder.iterdir():
            match = _OF_STEP.fullmatch(file.name)
            if match and int(match[1]) < position.num_retired - self._kept_steps:
                file.unlink()

    def _resumed(self, step: int) -> QueuePosition:
        _, position = self._read(_of_step(step))
        try:
            return position.resumed_at(step)
        except DataError as error:
            raise DataError(f"{self.folder / _of_step(step)}: {error}") from error

    def _read(self, name: str) -> tuple[str, QueuePosition]:
        file = self.folder / name
        try:
            return QueuePosition.parse(file.read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        except DataError as error:
            raise DataError(f"{file} is damaged: {error}") from error

    def _write(self, name: str, position: QueuePosition) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / name) as file:
            file.write(position.to_json(self._run_id).encode())


def _of_step(step: int) -> str:
    return f"position-{step}.json"
