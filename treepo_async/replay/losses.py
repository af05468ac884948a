"""What becomes of prompts that bring no tree.

They are told, written down where a person finds them, and the run ends when nothing else happens any more.
"""

from collections.abc import Callable
from dataclasses import dataclass

from treepo_async.errors import DataError, TreepoError
from treepo_async.metrics.events import emit
from treepo_async.replay.dead_letters import Letter
from treepo_async.replay.entry import Entry, Row, State
from treepo_async.replay.group import Group
from treepo_async.replay.queue import Queue
from treepo_async.types import Prompt


@dataclass
class Losses:
    """See the module."""

    queue: Queue
    prompt: Callable[[int], Prompt]
    group: Group
    max_lost: int
    """Prompts lost in a row that end the run."""

    def taken_back(self, entry: Entry, reason: str) -> None:
        """A lease was taken back from its actor; maybe that was the last attempt."""
        emit("alarm", alarm="lease taken back", lease=entry.lease_id, reason=reason)
        if entry.state is State.QUARANTINED:
            self.bury(entry, reason)

    def bury(self, entry: Entry, reason: str) -> None:
        """A prompt is quarantined.

        Raises:
            TreepoError: as `lost`.
        """
        self.write_down(entry.row(), reason)
        self.lost(entry.lease_id, reason)

    def write_down(self, row: Row, reason: str) -> None:
        """Leave a letter about a prompt that was given up."""
        try:
            prompt = self.prompt(row.prompt_index)
            name, text = prompt.id, prompt.text
        except DataError as error:
            name, text = "", str(error)
        self.group.bury(Letter(row, reason, name, text))

    def lost(self, lease_id: str, reason: str) -> None:
        """A prompt ended without a tree.

        Raises:
            TreepoError: `max_lost` did in a row.
        """
        emit("alarm", alarm="prompt lost", lease=lease_id, reason=reason)
        if self.queue.num_lost >= self.max_lost:
            raise TreepoError(
                f"{self.queue.num_lost} prompts in a row were lost, the last by {reason}; see the actors' logs"
            )
