"""What a journal makes of a queue's changes: rows and steps in dicts, as a disk would have them."""

import json

from treepo_async.replay.entry import LIVE
from treepo_async.replay.state import Changes, Counts, QueueState, StepRow


class Journal:
    """Takes changes in the form that goes to disk, and gives the state that they add up to."""

    def __init__(self, state=None):
        state = state or QueueState()
        self.counts = state.counts
        self.rows = {row.prompt_index: row for row in state.rows}
        self.steps = {(row.step, row.lineage): row.digest for row in state.steps}

    def write(self, queue):
        """All that happened since the last call."""
        changes = queue.take_changes()
        if changes is not None:
            self.apply(Changes.parse(changes.to_json()))

    def apply(self, changes):
        self.counts = changes.counts
        self.rows |= {row.prompt_index: row for row in changes.rows}
        for index in changes.gone:
            self.rows.pop(index, None)
        self.steps |= {(row.step, row.lineage): row.digest for row in changes.steps}
        first = self.counts.num_retired
        self.rows = {i: row for i, row in self.rows.items() if _is_kept(row, first)}
        self.steps = {key: digest for key, digest in self.steps.items() if key[0] >= first}

    def state(self):
        """What a queue is made of; checked."""
        state = QueueState(
            Counts.parse(self.counts.to_json()),
            tuple(self.rows[i] for i in sorted(self.rows)),
            tuple(StepRow(lineage, step, digest) for (step, lineage), digest in self.steps.items()),
        )
        state.check()
        return state

    def copy(self):
        return Journal(self.state())


def comparable(state):
    """The state with what has no order in an order, and what JSON cannot tell apart made equal."""
    counts = json.loads(state.counts.to_json())
    return counts, state.rows, sorted(state.steps)


def _is_kept(row, first_step):
    return row.state in LIVE or (row.step is not None and row.step >= first_step)
